"""One half of the test images chooses, the other confirms; the two have no image in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.images.data import ImageSet


@dataclass(frozen=True)
class EvaluationSplit:
    """Images in random order, to choose on or to confirm on.

    ``dense_correct`` is the dense network's correctness on them: bool, shape (N,), on the CPU.
    """

    images: ImageSet
    dense_correct: torch.Tensor

    def __len__(self):
        return len(self.images)

    def first(self, most: int | None) -> EvaluationSplit:
        """Return at most the first ``most`` images; None for all."""
        return EvaluationSplit(self.images.rows(slice(most)), self.dense_correct[:most])


def split_test(
    test: ImageSet, dense_correct: torch.Tensor, seed: int
) -> tuple[EvaluationSplit, EvaluationSplit]:
    """Return the half to choose on and the half to confirm on, each shuffled.

    Raises:
        UserError: There is only one image.
    """
    halves = test.halves(seed)
    return tuple(EvaluationSplit(test.rows(half), dense_correct[half]) for half in halves)
