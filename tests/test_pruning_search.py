import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from common.model import ResNet18
from pruning import search


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


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.booleans())
def test_sweep_equals_brute_force(seed, with_ties):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(40, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    if with_ties:
        weight = (weight * 4).round() / 4
    bias = torch.randn(4, generator=generator) / 10
    labels = torch.randint(0, 4, (40,), generator=generator)
    found = search.sweep(features, labels, weight, bias)
    assert found.tolist() == brute_force_counts(features, labels, weight, bias)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_binary_search_is_right_on_falling_curves(values, required):
    curve = sorted(values, reverse=True)
    curve[0] = 100  # nothing pruned is within the tolerance
    found, steps = search.binary_search(curve.__getitem__, len(curve) - 1, required)
    assert found == max(k for k, correct in enumerate(curve) if correct >= required)
    assert all(step.kept == (curve[step.count] >= required) for step in steps)
    assert len(steps) <= int(np.ceil(np.log2(len(curve)))) + 1


@settings(max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 100))
def test_answer_holds_on_any_curve_and_sweep_finds_the_maximum(values, required):
    curve = np.array([100, *values])
    found, _ = search.binary_search(lambda k: int(curve[k]), len(curve) - 1, required)
    largest = search.largest_within(curve, required)
    assert curve[found] >= required
    assert found <= largest
    assert (curve[largest + 1 :] < required).all()
    explanation = search.explain(curve, required, found)
    assert ("confirms" in explanation) == (found == largest)


def test_non_monotone_curve_is_told():
    curve = np.array([10, 10, 4, 10, 3])
    found, _ = search.binary_search(lambda k: int(curve[k]), 4, 9)
    assert (found, search.largest_within(curve, 9)) == (1, 3)
    assert not search.is_monotone(curve)
    assert "at 2 pruned" in search.explain(curve, 9, found)
    assert "up to 3" in search.explain(curve, 9, found)
    assert search.is_monotone(np.array([5, 5, 4, 0]))


@pytest.mark.parametrize(
    ("dense", "total", "tolerance", "expected"),
    [(900, 1000, 0.02, 880), (90, 100, 0.015, 89), (5, 1000, 0.02, 0), (10, 10, 0.0, 10)],
)
def test_required_images(dense, total, tolerance, expected):
    assert search.required_correct(dense, total, tolerance) == expected


def make_head(seed=0, images=200):
    torch.manual_seed(seed)
    model = ResNet18((4, 8, 8, 8)).eval()
    features = torch.rand(images, 8)
    with torch.no_grad():
        labels = model.linear(features).argmax(1)
    return model, features, labels


def test_search_linear_reports_all_that_it_did():
    model, features, labels = make_head()
    result, found = search.search_linear(model, features, labels, 0.05, None)
    assert result["max_amount"] == found / 80
    assert result["kept_weights"] == 80 - found
    assert len(result["curve"]) == 81
    assert result["curve"][0] == [0.0, 1.0]
    accuracies = [accuracy for _, accuracy in result["curve"]]
    assert accuracies[found] >= 0.95
    assert result["exhaustive_max_amount"] >= result["max_amount"]
    for step in result["steps"]:
        assert step["accuracy"]["value"] == accuracies[step["pruned_weights"]]


def test_holdout_uses_other_images_to_confirm():
    model, features, labels = make_head()
    result, _ = search.search_linear(model, features, labels, 0.05, 7)
    assert result["images"] == 100
    assert result["holdout"]["accuracy"]["total"] == 100
    drop = result["holdout"]["dense"]["value"] - result["holdout"]["accuracy"]["value"]
    assert result["holdout"]["drop"] == pytest.approx(drop)
    assert result["holdout"]["within_tolerance"] == (drop <= 0.05 + 1e-12)
