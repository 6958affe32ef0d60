"""One half of the test images chooses, the other confirms; the two have no image in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.command.cli import UserError
from common.images.data import Cifar10


@dataclass(frozen=True)
class Half:
    """Some of the test images, and which of them the dense network gets right (bool, CPU)."""

    images: Cifar10
    dense_correct: torch.Tensor

    def first(self, most: int | None) -> Half:
        """Return at most the first ``most`` of them; None for all."""
        return Half(self.images.rows(slice(most)), self.dense_correct[:most])


def require_enough_images(test_images: int, tolerance: float) -> None:
    """Check that a network could be kept at all: one that loses nothing has an error to spare.

    The standard error of a loss is taken for one image at least (:mod:`common.measure.budget`), so
    the half to choose on needs 1/``tolerance`` images.

    Raises:
        UserError: It could not.
    """
    if tolerance == 0:
        raise UserError("--scope: a tolerance of 0 leaves no standard error to spare")
    needed = 2 * math.ceil(1 / tolerance - 1e-9)
    if test_images < needed - 1:
        raise UserError(
            f"--scope: within {100 * tolerance:g} points and one standard error to spare, choosing "
            f"on half of the images takes {needed:,} test images, not {test_images:,}"
        )


def split_test(test: Cifar10, dense_correct: torch.Tensor, seed: int) -> tuple[Half, Half]:
    """Return the half to choose on and the half to confirm on, each shuffled."""
    return tuple(Half(test.rows(half), dense_correct[half]) for half in test.halves(seed))
