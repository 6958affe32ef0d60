import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from common.network.resnet import ResNet18, Widths
from pruning.alone.linear import (
    SPLITS,
    LinearSearch,
    binary_search,
    repeat_on_halves,
    required_correct,
    search_linear,
    sweep,
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
    found = sweep(features, labels, weight, bias).sum(axis=1)
    assert found.tolist() == brute_force_counts(features, labels, weight, bias)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_binary_search_is_right_on_falling_curves(values, required):
    curve = sorted(values, reverse=True)
    curve[0] = 100  # nothing pruned is within the tolerance
    found, steps = binary_search(curve.__getitem__, len(curve) - 1, required)
    assert found == max(k for k, correct in enumerate(curve) if correct >= required)
    assert all(step.kept == (curve[step.count] >= required) for step in steps)
    assert len(steps) <= int(np.ceil(np.log2(len(curve)))) + 1


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_answer_holds_on_any_curve_and_sweep_finds_the_maximum(values, required):
    curve = np.array([100, *values])
    found, _ = binary_search(lambda k: int(curve[k]), len(curve) - 1, required)
    search = searched(curve, required, found)
    assert curve[found] >= required
    assert found <= search.largest
    assert (curve[search.largest + 1 :] < required).all()
    assert ("confirms" in search.explain()) == (found == search.largest)


def searched(curve, required, found):
    return LinearSearch(0.1, found, [], required, 100, curve, None)


def test_non_monotone_curve_is_told():
    curve = np.array([10, 10, 4, 10, 3])
    found, _ = binary_search(lambda k: int(curve[k]), 4, 9)
    result = searched(curve, 9, found)
    assert (found, result.largest) == (1, 3)
    assert not result.is_monotone
    assert "at 2 pruned" in result.explain()
    assert "up to 3" in result.explain()
    assert searched(np.array([5, 5, 4, 0]), 0, 3).is_monotone


@pytest.mark.parametrize(
    ("dense", "total", "tolerance", "expected"),
    [(900, 1000, 0.02, 880), (90, 100, 0.015, 89), (5, 1000, 0.02, 0), (10, 10, 0.0, 10)],
)
def test_required_images(dense, total, tolerance, expected):
    assert required_correct(dense, total, tolerance) == expected


def make_head(seed=0, images=200):
    torch.manual_seed(seed)
    model = ResNet18(Widths((4, 8, 8, 8))).eval()
    features = torch.rand(images, 8)
    with torch.no_grad():
        labels = model.linear(features).argmax(1)
    return model, features, labels


def test_search_linear_reports_all_that_it_did():
    model, features, labels = make_head()
    found = search_linear(model.linear, features, labels, 0.05, seed=0)
    assert (found.weights, found.images, found.required) == (80, 200, 190)
    assert found.correct[0] == 200
    assert found.correct[found.found] >= 190
    assert found.largest >= found.found
    assert all(step.correct == found.correct[step.count] for step in found.steps)
    assert len(found.splits.drops) == SPLITS


# --- halves --------------------------------------------------------------------------------------


def test_each_split_is_judged_by_the_images_that_did_not_choose():
    """Row k loses images 0 to k, so a half's answer depends on which of them it has."""
    correct = np.array([np.arange(10) >= count for count in range(11)])
    splits = repeat_on_halves(correct, tolerance=0.2, seed=3)
    rng = np.random.default_rng(3)
    for count, drop in zip(splits.counts, splits.drops, strict=True):
        order = rng.permutation(10)
        chooses, judges = order[:5], order[5:]
        allowed = [n for n in range(11) if (chooses < n).sum() <= 1]  # 0.2 of 5 images
        assert count == max(allowed)
        assert drop == pytest.approx((judges < count).sum() / 5)
    assert splits.within == sum(drop <= 0.2 + 1e-9 for drop in splits.drops)
    assert 0 < splits.within < SPLITS


def test_what_is_chosen_on_noise_does_worse_elsewhere():
    """The audit's finding: an answer just within the tolerance where it was chosen is not so new.

    Images differ in how much pruning they bear, all alike in both halves.
    """
    bears = np.random.default_rng(0).integers(0, 1000, 400)
    correct = np.array([bears >= count for count in range(1001)])
    splits = repeat_on_halves(correct, tolerance=0.1, seed=0)
    assert 0.2 < splits.within / SPLITS < 0.8
    assert splits.drops.mean() == pytest.approx(0.1, abs=0.02)


def test_one_image_has_no_halves():
    assert repeat_on_halves(np.ones((4, 1), dtype=bool), 0.1, 0) is None
