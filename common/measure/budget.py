"""The accuracy that may be lost, and the images that choose what is within it.

Where an amount is chosen because its loss is just within the budget, new images find it outside as
often as not, so a choice must leave one standard error to spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from common.images.data import ImageSet
from common.measure.evaluate import Comparison, Paired

FIRST_LOOK = 250  # images


@dataclass(frozen=True)
class Verdict(Paired):
    """How a candidate did on the images that choose, or as many as it was shown of them.

    Attributes:
        spare: What is left of the budget after its loss and one standard error; a fraction.
    """

    spare: float

    @property
    def shown(self) -> int:
        """How many images it was shown; fewer than all, where the outcome was clear."""
        return self.accuracy.total

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
        dense_correct: The dense network's correctness on them: bool, shape (N,), on the CPU.
    """

    max_drop: float
    images: ImageSet
    dense_correct: torch.Tensor

    def judge(
        self,
        find_correct: Callable[[ImageSet], torch.Tensor],
        looks: Iterable[int],
        clearly_out: float = math.inf,
        clearly_in: float = math.inf,
    ) -> Verdict:
        """Evaluate a candidate on the images that choose, for as long as its outcome is not clear.

        Args:
            find_correct: Returns which of some images it gets right: bool, on the CPU.
            looks: After how many images to look at the outcome; the last is all.
            clearly_out: Standard errors over the budget from which on it is not looked at further.
            clearly_in: The same below the budget.
        """
        correct = torch.empty(0, dtype=torch.bool)
        for stop in looks:
            fresh = self.images.rows(slice(len(correct), stop))
            correct = torch.cat([correct, find_correct(fresh)])
            found = Paired.of(self.dense_correct[:stop], correct)
            left = self.max_drop - found.comparison.drop
            error = standard_error(found.comparison, stop)
            if not -clearly_out <= left / error <= clearly_in:
                break
        return Verdict(found.accuracy, found.comparison, left - error)


def doubling_looks(count: int) -> Iterator[int]:
    """Yield after how many of ``count`` images to look: FIRST_LOOK, twice as many, …, all."""
    look = FIRST_LOOK
    while look < count:
        yield look
        look *= 2
    yield count


def why_too_strict(count: int, max_drop: float, held_out: bool = False) -> str | None:
    """Say why a candidate that loses and gains nothing could not pass; None where it can.

    It must leave the error of one image, so choosing takes 1/``max_drop`` images.

    Args:
        count: Number of test images, of which half choose, or of held-out images, which all do.
        max_drop: The budget, as a fraction.
        held_out: Whether ``count`` is of held-out images.
    """
    if max_drop == 0:
        return "a budget of 0 points leaves no standard error to spare"
    choosing = math.ceil(1 / max_drop - 1e-9)
    if count >= (choosing if held_out else 2 * choosing - 1):
        return None
    needed = (
        f"{choosing:,} held-out images"
        if held_out
        else f"{2 * choosing:,} test images, of which half choose"
    )
    return (
        f"to be within {100 * max_drop:g} points with one standard error to spare takes {needed}, "
        f"not {count:,}"
    )


def standard_error(comparison: Comparison, total: int) -> float:
    """Return the standard error of a paired difference of accuracies on ``total`` images.

    Where two models never disagree it is that of one image on which they would.
    """
    lost, gained = comparison.only_a_correct, comparison.only_b_correct
    variance = lost + gained - (lost - gained) ** 2 / total
    return math.sqrt(max(variance, 1.0)) / total
