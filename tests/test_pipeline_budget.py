"""pipeline/budget.py: what a candidate may lose, and when it is looked at no further."""

from __future__ import annotations

import math

import pytest
import torch

from common.images.data import Cifar10
from common.measure.evaluate import compare
from pipeline.budget import Budget, looks, standard_error


def make_budget(count: int, max_drop: float) -> Budget:
    """Return a budget on images that hold their label's number as their brightness."""
    labels = torch.arange(count) % 10
    images = (labels * 20).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    return Budget(max_drop, Cifar10(images, labels), torch.ones(count, dtype=torch.bool))


class Reader:
    """Reads the label off the brightness, wrongly for the first of every ``period`` images."""

    def __init__(self, period: int):
        self.period, self.seen = period, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        brightness = (images[:, 0, 0, 0] * 0.2023 + 0.4914) * 255
        labels = (brightness / 20).round().long()
        numbers = torch.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        wrong = numbers % self.period == 0 if self.period else torch.zeros_like(numbers, dtype=bool)
        return torch.nn.functional.one_hot(torch.where(wrong, (labels + 1) % 10, labels), 10)


def test_a_candidate_within_the_budget_sees_all_images_and_leaves_a_standard_error():
    verdict = make_budget(1000, 0.02).judge(Reader(100), batch_size=64)
    assert verdict.shown == 1000
    assert verdict.comparison.drop == pytest.approx(0.01)
    variance = 0.01 - 0.01**2  # of one image's loss, which is 1 or 0
    assert verdict.spare == pytest.approx(0.02 - 0.01 - math.sqrt(variance / 1000))
    assert verdict.passes


def test_a_drop_within_the_budget_but_not_by_a_standard_error_fails():
    assert not make_budget(1000, 0.0105).judge(Reader(100), batch_size=64).passes


def test_what_is_clearly_out_is_dropped_at_the_first_look():
    reader = Reader(2)
    verdict = make_budget(1000, 0.01).judge(reader, batch_size=64)
    assert verdict.shown == reader.seen == 250
    assert not verdict.passes


def test_looks_end_with_all_images():
    assert list(looks(1000)) == [250, 500, 1000]
    assert list(looks(100)) == [100]
    assert list(looks(250)) == [250]


def test_two_models_that_agree_still_have_a_standard_error():
    same = torch.ones(50, dtype=torch.bool)
    assert standard_error(compare(same, same), 50) == 1 / 50
