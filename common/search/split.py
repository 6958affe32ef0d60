"""One half of the test images chooses, the other confirms; the two have no image in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.images.data import ImageSet


@dataclass(frozen=True)
class EvaluationSplit:
    """The images that choose, or those that confirm.

    Attributes:
        images: Images in random order.
        dense_correct: The dense network's correctness on them: bool, shape (N,), on the CPU.
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
    chosen, held_out = test.halves(seed)
    return (
        EvaluationSplit(test.rows(chosen), dense_correct[chosen]),
        EvaluationSplit(test.rows(held_out), dense_correct[held_out]),
    )
