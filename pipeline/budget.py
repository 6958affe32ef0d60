"""The accuracy that may be lost, and the images that choose what is within it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common.images.data import Cifar10, normalize
from common.measure.evaluate import Comparison, compare

# A candidate that has lost so many standard errors more than the budget is not looked at further.
CLEARLY_OUT = 3.0
FIRST_LOOK = 250  # images before that is asked for the first time; then at every doubling


@dataclass(frozen=True)
class Verdict:
    """How a candidate did on the images that choose.

    Attributes:
        comparison: With the dense network, on the images that it was shown.
        shown: Their number; fewer than all, where it was clearly out.
        spare: What is left of the budget after its loss and one standard error; a fraction.
    """

    comparison: Comparison
    shown: int
    spare: float

    @property
    def passes(self) -> bool:
        """Whether it is within the budget with a standard error to spare."""
        return self.spare >= 0


@dataclass(frozen=True)
class Budget:
    """At most ``max_drop`` (a fraction) may be lost against the dense network.

    Attributes:
        max_drop: The budget.
        images: Those that choose, in random order.
        dense_correct: The dense network's correctness on them: bool, shape (N,).
    """

    max_drop: float
    images: Cifar10
    dense_correct: torch.Tensor

    @torch.inference_mode()
    def judge(self, model: Callable[[torch.Tensor], torch.Tensor], batch_size: int) -> Verdict:
        """Evaluate a candidate on the images that choose, for as long as it is not clearly out."""
        correct = torch.empty(0, dtype=torch.bool)
        for stop in looks(len(self.images)):
            fresh = self.images.rows(slice(len(correct), stop))
            found = [
                model(normalize(images)).argmax(1).cpu()
                for images in fresh.images.split(batch_size)
            ]
            correct = torch.cat([correct, torch.cat(found) == fresh.labels.cpu()])
            comparison = compare(self.dense_correct[:stop], correct)
            excess = comparison.drop - self.max_drop
            if excess > CLEARLY_OUT * standard_error(comparison, stop):
                break
        error = standard_error(comparison, stop)
        return Verdict(comparison, stop, self.max_drop - comparison.drop - error)


def looks(count: int) -> Iterator[int]:
    """Yield after how many of ``count`` images to look: FIRST_LOOK, twice as many, …, all."""
    look = FIRST_LOOK
    while look < count:
        yield look
        look *= 2
    yield count


def standard_error(comparison: Comparison, total: int) -> float:
    """Return the standard error of a paired difference of accuracies on ``total`` images.

    Where two models never disagree it is that of one image on which they would.
    """
    lost, gained = comparison.only_a_correct, comparison.only_b_correct
    variance = lost + gained - (lost - gained) ** 2 / total
    return math.sqrt(max(variance, 1.0)) / total
