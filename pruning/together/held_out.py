"""One half of the test images chooses, the other confirms; the two have no image in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.images.data import ImageSet


@dataclass(frozen=True)
class Half:
    """Some of the test images, and which of them the dense network gets right (bool, CPU)."""

    images: ImageSet
    dense_correct: torch.Tensor

    def first(self, most: int | None) -> Half:
        """Return at most the first ``most`` of them; None for all."""
        return Half(self.images.rows(slice(most)), self.dense_correct[:most])


def split_test(test: ImageSet, dense_correct: torch.Tensor, seed: int) -> tuple[Half, Half]:
    """Return the half to choose on and the half to confirm on, each shuffled."""
    return tuple(Half(test.rows(half), dense_correct[half]) for half in test.halves(seed))
