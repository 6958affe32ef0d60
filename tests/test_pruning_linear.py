import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from common.network.tracing import trace_network, weight_layers
from pruning.alone.head import AMOUNTS_OF_SEVERAL, Head, sweep_single
from pruning.alone.linear import (
    SPLITS,
    binary_search,
    compare_with_sweep,
    repeat_on_halves,
    required_correct,
    search_linear,
)


def brute_force_counts(features, labels, weight, bias):
    """One torch pruning and one matrix product for every count."""
    counts = []
    for count in range(weight.numel() + 1):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        if count:
            prune.l1_unstructured(layer, "weight", count)
        with torch.inference_mode():
            counts.append(int((layer(features.double()).argmax(1) == labels).sum()))
    return counts


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.booleans())
def test_sweep_equals_brute_force(seed, with_ties):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(40, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    if with_ties:
        weight = (weight * 4).round() / 4
    bias = torch.randn(4, generator=generator) / 10
    labels = torch.randint(0, 4, (40,), generator=generator)
    found = sweep_single(features, labels, weight, bias).sum(axis=1)
    assert found.tolist() == brute_force_counts(features, labels, weight, bias)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_binary_search_is_right_on_falling_curves(values, required):
    curve = sorted(values, reverse=True)
    curve[0] = 100  # nothing pruned is within the tolerance
    found, tried = binary_search(curve.__getitem__, len(curve) - 1, required)
    assert found == max(k for k, correct in enumerate(curve) if correct >= required)
    assert len(tried) <= int(np.ceil(np.log2(len(curve)))) + 1


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_answer_holds_on_any_curve_and_sweep_finds_the_maximum(values, required):
    curve = np.array([100, *values])
    found, _ = binary_search(lambda k: int(curve[k]), len(curve) - 1, required)
    largest, _, explanation = compared(found, curve, required)
    assert curve[found] >= required
    assert found <= largest
    assert (curve[largest + 1 :] < required).all()
    assert ("confirms" in explanation) == (found == largest)


def compared(found, curve, required):
    """The largest level that is within the tolerance, and the other entries."""
    told = compare_with_sweep(found, curve, required, np.arange(len(curve)))
    largest = round(told["exhaustive_max_amount"] * (len(curve) - 1))
    return largest, told["monotone"], told["explanation"]


def test_non_monotone_curve_is_told():
    curve = np.array([10, 10, 4, 10, 3])
    found, _ = binary_search(lambda k: int(curve[k]), 4, 9)
    largest, is_monotone, explanation = compared(found, curve, 9)
    assert (found, largest, is_monotone) == (1, 3, False)
    assert "at 2 pruned" in explanation
    assert "up to 3" in explanation
    assert compared(3, np.array([5, 5, 4, 0]), 0)[1]


@pytest.mark.parametrize(
    ("dense", "total", "tolerance", "expected"),
    [(900, 1000, 0.02, 880), (90, 100, 0.015, 89), (5, 1000, 0.02, 0), (10, 10, 0.0, 10)],
)
def test_required_images(dense, total, tolerance, expected):
    assert required_correct(dense, total, tolerance) == expected


def head_of(*modules):
    """The head of a network on images of 8 × 8 pixels, and its module."""
    model = nn.Sequential(*modules).eval()
    network = trace_network(model, (3, 8, 8))
    weights = {name: m.weight.detach() for name, m in weight_layers(model, network).items()}
    return Head.of(network, weights), model


def search(head, model, before, tolerance, images=200):
    """Search on random images that the model classifies as labelled."""
    x = torch.randn(images, 3, 8, 8)
    with torch.inference_mode():
        labels = model(x).argmax(1)
        return search_linear(head, model[:before](x), labels, tolerance, seed=0), x, labels


def test_search_reports_all_that_it_did():
    torch.manual_seed(0)
    head, model = head_of(nn.Conv2d(3, 2, 5, 2), nn.Flatten(), nn.Linear(8, 10))
    (level, found), _, _ = search(head, model, 2, 0.05)
    assert (head.features, list(head.weights)) == ("1", ["2"])
    assert (found["images"], found["dense"]["correct"]) == (200, 200)
    assert (found["pruned_weights"], found["kept_weights"]) == (level, 80 - level)
    amounts, accuracies = zip(*found["curve"], strict=True)
    assert amounts == tuple(level / 80 for level in range(81))
    assert accuracies[level] >= 0.95
    assert found["exhaustive_max_amount"] >= found["max_amount"] == level / 80
    for step in found["steps"]:
        assert step["accuracy"]["value"] == accuracies[step["pruned_weights"]]
        assert step["kept"] == (step["accuracy"]["correct"] >= 190)
    assert found["splits"]["splits"] == SPLITS


def test_several_linear_layers_are_pruned_together_by_the_same_amount():
    """Against torch's own pruning of the whole network, at each amount."""
    torch.manual_seed(1)
    modules = [nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 5)]
    head, model = head_of(*modules)
    (answer, found), x, labels = search(head, model, 2, 0.1)
    assert list(head.weights) == found["layers"] == ["2", "4"]
    assert head.levels == AMOUNTS_OF_SEVERAL
    total = found["pruned_weights"] + found["kept_weights"]
    assert total == 72 * 20 + 20 * 5
    for level in (1, 37, 90, 100):
        pruned = copy.deepcopy(model)
        for name in ("2", "4"):
            prune.l1_unstructured(pruned[int(name)], "weight", level / 100)
        with torch.inference_mode():
            correct = int((pruned(x).argmax(1) == labels).sum())
        amount, accuracy = found["curve"][level]
        assert accuracy * len(x) == pytest.approx(correct, abs=1.001)
        zeros = sum(int((pruned[i].weight == 0).sum()) for i in (2, 4))
        assert amount == zeros / total
    assert found["curve"][answer][1] >= 0.9


def test_head_ends_where_more_than_a_vector_is_read():
    """The linear layers of a squeeze-and-excitation block are no part of the head."""

    class Excited(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            gate = self.gate(x.mean((2, 3))).sigmoid().view(-1, 4, 1, 1)
            return self.fc((x * gate).mean((2, 3)))

    model = Excited().eval()
    network = trace_network(model, (3, 8, 8))
    weights = {name: layer.weight for name, layer in network.layers.items()}
    assert list(Head.of(network, weights).weights) == ["fc"]


def test_network_that_ends_in_a_convolution_has_no_head():
    head, _ = head_of(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert head is None


# --- halves --------------------------------------------------------------------------------------


def test_each_split_is_judged_by_the_images_that_did_not_choose():
    """Row k loses images 0 to k, so a half's answer depends on which of them it has."""
    correct = np.array([np.arange(10) >= count for count in range(11)])
    splits = repeat_on_halves(correct, np.arange(11) / 10, tolerance=0.2, seed=3)
    rng, levels, lost = np.random.default_rng(3), [], []
    for _ in range(SPLITS):
        order = rng.permutation(10)
        chooses, judges = order[:5], order[5:]
        levels.append(max(n for n in range(11) if (chooses < n).sum() <= 1))  # 0.2 of 5 images
        lost.append(int((judges < levels[-1]).sum()))
    low, median, high = np.quantile(levels, [0.05, 0.5, 0.95]) / 10
    assert splits["amount"]["median"] == pytest.approx(median)
    assert splits["amount"]["middle90"] == pytest.approx([low, high])
    assert splits["drop"]["mean"] == pytest.approx(sum(lost) / SPLITS / 5)
    assert 0 < splits["within_tolerance"] == sum(images <= 1 for images in lost) < SPLITS


def test_what_is_chosen_on_noise_does_worse_elsewhere():
    """The audit's finding: an answer just within the tolerance where it was chosen is not so new.

    Images differ in how much pruning they bear, all alike in both halves.
    """
    bears = np.random.default_rng(0).integers(0, 1000, 400)
    correct = np.array([bears >= count for count in range(1001)])
    splits = repeat_on_halves(correct, np.arange(1001) / 1000, tolerance=0.1, seed=0)
    assert 0.2 < splits["within_tolerance"] / SPLITS < 0.8
    assert splits["drop"]["mean"] == pytest.approx(0.1, abs=0.02)


def test_one_image_has_no_halves():
    assert repeat_on_halves(np.ones((4, 1), dtype=bool), np.arange(4) / 3, 0.1, 0) is None
