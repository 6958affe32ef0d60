"""common/search/budget.py: what a candidate may lose, and when it is looked at no further."""

from __future__ import annotations

import math

import pytest
import torch
from cifar import image_set

from common.images.data import ImageSet
from common.measure.evaluate import compare
from common.search.budget import (
    Budget,
    EvaluationSplit,
    doubling_looks,
    standard_error,
    why_too_few,
    why_too_strict,
)


def make_budget(count: int, max_drop: float) -> Budget:
    """Return a budget on images that hold their label's number as their brightness."""
    labels = torch.arange(count) % 10
    images = (labels * 20).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    dense_correct = torch.ones(count, dtype=torch.bool)
    return Budget(max_drop, EvaluationSplit(image_set(images, labels), dense_correct))


class Reader:
    """Reads the label off the brightness, wrongly for the first of every ``period`` images."""

    def __init__(self, period: int):
        self.period, self.seen = period, 0

    def __call__(self, images: ImageSet) -> torch.Tensor:
        labels = images.images[:, 0, 0, 0].long() // 20
        numbers = torch.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        return (labels == images.labels) & (numbers % self.period > 0)


def test_a_candidate_within_the_budget_sees_all_images_and_leaves_a_standard_error():
    verdict = make_budget(1000, 0.02).judge(Reader(100))
    assert verdict.accuracy.total == 1000
    assert verdict.comparison.drop == pytest.approx(0.01)
    variance = 0.01 - 0.01**2  # of one image's loss, which is 1 or 0
    assert verdict.spare == pytest.approx(0.02 - 0.01 - math.sqrt(variance / 1000))
    assert verdict.passes


def test_a_drop_within_the_budget_but_not_by_a_standard_error_fails():
    assert not make_budget(1000, 0.0105).judge(Reader(100)).passes


def test_what_is_clearly_out_is_dropped_at_the_first_look():
    reader = Reader(2)
    verdict = make_budget(1000, 0.01).judge(reader)
    assert verdict.accuracy.total == reader.seen == 250
    assert not verdict.passes


def test_all_images_are_looked_at_where_asked_for():
    assert make_budget(1000, 0.01).judge(Reader(2), stop_early=False).accuracy.total == 1000


def test_looks_end_with_all_images():
    assert list(doubling_looks(1000)) == [250, 500, 1000]
    assert list(doubling_looks(100)) == [100]
    assert list(doubling_looks(250)) == [250]


def test_two_models_that_agree_still_have_a_standard_error():
    same = torch.ones(50, dtype=torch.bool)
    assert standard_error(compare(same, same), 50) == 1 / 50


def test_the_standard_error_is_of_the_paired_loss():
    dense = torch.tensor([True] * 90 + [False] * 10)
    pruned = torch.tensor([False] * 6 + [True] * 84 + [True] * 2 + [False] * 8)
    # 6 lost, 2 gained: variance 8 - 16 / 100.
    assert standard_error(compare(dense, pruned), 100) == pytest.approx((8 - 0.16) ** 0.5 / 100)


def test_too_few_images_for_any_network_to_pass(random_images):
    """It said "0.0 % of the weights can go" there; now it says how many images it takes."""
    for count, passes in ((50, True), (49, False)):
        right = torch.ones(count, dtype=torch.bool)
        budget = Budget(0.02, EvaluationSplit(random_images(count), right))
        verdict = budget.judge(lambda images: torch.ones(len(images), dtype=bool))
        assert verdict.passes == passes  # of a network that loses nothing
    assert why_too_strict(99, 0.02) is None  # 50 of which choose
    assert "takes 100 test images, of which half choose, not 98" in why_too_strict(98, 0.02)
    assert why_too_strict(50, 0.02, held_out=True) is None
    assert "takes 50 held-out images, not 49" in why_too_strict(49, 0.02, held_out=True)
    assert "to be within 1 point with" in why_too_strict(198, 0.01)
    assert "a budget of 0 points leaves" in why_too_strict(10_000, 0.0)


def test_few_images_to_confirm_with_are_told():
    """1.96 * sqrt(0.026 / 150) is 0.0258."""
    told = why_too_few(150, 0.01)
    assert told.startswith("150 images to confirm with are few for 1 point: where 2.6 % of")
    assert told.endswith("a loss is known to ± 2.6 points")
    assert why_too_few(150, 0.03) is None
    assert why_too_few(5000, 0.01) is None
