"""Accuracy, intervals and paired comparison against formulas written out here."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import normalize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from common.measure.evaluate import (
    Accuracy,
    compare,
    mcnemar_exact,
    measure_accuracy,
    paired_difference_interval,
    predict,
)

REPOSITORY = Path(__file__).resolve().parents[1]
Z = 1.959963984540054


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_accuracy_has_wilsons_interval(counts):
    correct, total = counts
    share = correct / total
    centre = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / (1 + Z**2 / total)
    low, high = Accuracy(correct, total).ci95
    assert low == pytest.approx(centre - half, abs=1e-12)
    assert high == pytest.approx(centre + half, abs=1e-12)
    assert -1e-15 <= low <= share <= high <= 1 + 1e-15


def test_accuracy_as_dict():
    entry = measure_accuracy(torch.tensor([True, False, True, True])).as_dict()
    assert entry == {
        "correct": 3,
        "total": 4,
        "value": 0.75,
        "ci95": pytest.approx([0.3006, 0.9544], abs=1e-4),
    }


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    discordant = only_a + only_b
    tail = binom.cdf(min(only_a, only_b), discordant, 0.5)
    assert mcnemar_exact(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def score_by_grid(only_a: int, only_b: int, total: int, difference: float) -> float:
    """Tango's score statistic, its nuisance parameter found by brute force on the likelihood."""
    # P(only b) = q, P(only a) = q + difference, P(neither alone) = 1 - 2q - difference.
    low, high = max(0.0, -difference), (1 - difference) / 2
    for _ in range(6):  # refine around the maximum
        q = np.linspace(low, high, 401)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = [
                np.where(count > 0, count * np.log(np.maximum(probability, 0)), 0.0)
                for count, probability in (
                    (only_a, q + difference),
                    (only_b, q),
                    (total - only_a - only_b, 1 - 2 * q - difference),
                )
            ]
        best = int(np.nanargmax(np.sum(terms, axis=0)))
        low, high = q[max(best - 1, 0)], q[min(best + 1, 400)]
    variance = total * (2 * q[best] + difference - difference**2)
    return (only_a - only_b - total * difference) / math.sqrt(max(variance, 1e-300))


@pytest.mark.parametrize(
    ("only_a", "only_b", "total"),
    [
        (0, 0, 10),
        (3, 1, 20),
        (1, 3, 20),
        (5, 0, 40),
        (0, 7, 9),
        (12, 30, 1000),
        (9, 9, 18),
        (1, 0, 1),
    ],
)
def test_paired_interval_inverts_the_score_test(only_a, only_b, total):
    low, high = paired_difference_interval(only_a, only_b, total)
    estimate = (only_a - only_b) / total
    assert low <= estimate <= high
    for limit, sign in ((low, 1), (high, -1)):
        outside, inside = limit - sign * 1e-4, limit + sign * 1e-4
        if -1 < outside < 1:
            assert sign * score_by_grid(only_a, only_b, total, outside) > Z
        if -1 < inside < 1 and sign * (estimate - inside) > 0:
            assert sign * score_by_grid(only_a, only_b, total, inside) < Z


@pytest.mark.parametrize("total", [1, 2, 5, 13])
def test_paired_interval_of_every_small_table(total):
    for only_a in range(total + 1):
        for only_b in range(total + 1 - only_a):
            low, high = paired_difference_interval(only_a, only_b, total)
            assert -1 <= low <= (only_a - only_b) / total <= high <= 1
            mirrored = paired_difference_interval(only_b, only_a, total)
            assert mirrored == pytest.approx((-high, -low), abs=1e-9)


@given(st.integers(1, 50_000))
def test_paired_interval_where_no_image_differs(total):
    half = Z**2 / (total + Z**2)
    assert paired_difference_interval(0, 0, total) == pytest.approx((-half, half), abs=1e-9)


@given(st.data())
@settings(max_examples=60)
def test_paired_interval_stands_any_counts(data):
    total = data.draw(st.integers(1, 1_000_000))
    only_a = data.draw(st.integers(0, total))
    only_b = data.draw(st.integers(0, total - only_a))
    low, high = paired_difference_interval(only_a, only_b, total)
    assert -1 <= low <= (only_a - only_b) / total + 1e-12
    assert (only_a - only_b) / total - 1e-12 <= high <= 1


@pytest.mark.parametrize(("p_a", "p_b"), [(0.05, 0.05), (0.1, 0.03), (0.3, 0.1), (0.02, 0.2)])
def test_paired_interval_covers_the_truth(p_a, p_b):
    """Exact coverage at 25 images, by enumerating every table that can come up."""
    total, covered = 25, 0.0
    for only_a in range(total + 1):
        for only_b in range(total + 1 - only_a):
            probability = (
                math.comb(total, only_a)
                * math.comb(total - only_a, only_b)
                * p_a**only_a
                * p_b**only_b
                * (1 - p_a - p_b) ** (total - only_a - only_b)
            )
            low, high = paired_difference_interval(only_a, only_b, total)
            covered += probability * (low <= p_a - p_b <= high)
    assert 0.925 < covered < 0.995


def test_compare_counts_the_images_on_which_models_differ():
    a = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    b = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
    comparison = compare(a, b)
    assert (comparison.only_a_correct, comparison.only_b_correct) == (3, 1)
    assert comparison.drop == pytest.approx(0.2)
    assert comparison.drop == pytest.approx(measure_accuracy(a).value - measure_accuracy(b).value)
    assert comparison.mcnemar_p == pytest.approx(10 / 16)  # (C(4,0) + C(4,1)) / 2^4, twice
    assert comparison.as_dict()["ci95"] == list(paired_difference_interval(3, 1, 10))


def test_compare_refuses_other_images():
    with pytest.raises(ValueError, match="not the same images"):
        compare(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_predict_is_a_plain_loop(tiny_model, random_images, batch_size):
    dataset = random_images(23)
    with torch.no_grad():
        expected = [int(tiny_model(normalize(image[None])).argmax()) for image in dataset.images]
    predictions = predict(tiny_model, dataset, batch_size)
    assert predictions.tolist() == expected
    assert len(set(expected)) > 1
    assert predictions.dtype == torch.int64


def test_memory_does_not_grow_with_the_images():
    """4,000 normalised images would be 49 MB; only one batch of them may exist at a time."""
    code = """
import sys
import torch
sys.path.append("tests")
from cifar import image_set
from common.machine.device import peak_memory_bytes
from common.measure.evaluate import predict
from resnet18 import ResNet18, Widths

torch.set_num_threads(1)
model = ResNet18(Widths((4, 8, 8, 8))).eval()
images = image_set(torch.zeros(4000, 3, 32, 32, dtype=torch.uint8), torch.zeros(4000).long())
predict(model, images.rows(slice(64)), 64)
before = peak_memory_bytes()
predict(model, images, 64)
print(peak_memory_bytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20e6
