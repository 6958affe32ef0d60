"""The accuracy that may be lost, and the images that choose what is within it.

Where an amount is chosen because its loss is just within the budget, new images find it outside as
often as not, so a choice must leave one standard error to spare. One half of the test images
chooses, the other confirms; the two have no image in common.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.command.cli import counted
from common.images.data import ImageSet
from common.measure.evaluate import Comparison, Paired, Z

FIRST_LOOK = 250  # images
# Stop evaluating once the loss exceeds the budget by this many standard errors.
CLEARLY_OUT = 3.0
# Images of which one network of two is right and the other wrong: dense ResNet18, and the bundled
# answer ``both`` of the README.
USUAL_FLIPS = 0.026


@dataclass(frozen=True)
class EvaluationSplit:
    """Images in random order, to choose on or to confirm on."""

    images: ImageSet
    dense_correct: torch.Tensor  # the dense network's correctness: bool, (N,), on the CPU

    def __len__(self):
        return len(self.images)

    def first(self, most: int | None) -> "EvaluationSplit":
        """Return at most the first ``most`` images; None for all."""
        return EvaluationSplit(self.images.rows(slice(most)), self.dense_correct[:most])


def split_test(
    test: ImageSet, dense_correct: torch.Tensor, seed: int
) -> tuple[EvaluationSplit, EvaluationSplit]:
    """Return the half to choose on and the half to confirm on; see :meth:`ImageSet.halves`."""
    halves = test.halves(seed)
    return tuple(EvaluationSplit(test.rows(half), dense_correct[half]) for half in halves)


@dataclass(frozen=True)
class Verdict(Paired):
    """How a candidate did on the images that choose: on fewer, if it is clearly over the budget."""

    spare: float  # budget left after its loss and one standard error; a fraction

    @property
    def passes(self) -> bool:
        """Whether it is within the budget with a standard error to spare."""
        return self.spare >= 0


@dataclass(frozen=True)
class Budget:
    """The accuracy that may be lost, ``max_drop``, a fraction; and the images that choose."""

    max_drop: float
    choosing: EvaluationSplit

    def judge(
        self, find_correct: Callable[[ImageSet], torch.Tensor], stop_early: bool = True
    ) -> Verdict:
        """Evaluate a candidate on the images that choose.

        ``find_correct`` returns which of some images it gets right: bool, on the CPU. With
        ``stop_early``, it sees no more images once it is clearly over the budget.
        """
        correct = torch.empty(0, dtype=torch.bool)
        count = len(self.choosing)
        for stop in doubling_looks(count) if stop_early else [count]:
            fresh = self.choosing.images.rows(slice(len(correct), stop))
            correct = torch.cat([correct, find_correct(fresh)])
            found = Paired.of(self.choosing.dense_correct[:stop], correct)
            left = self.max_drop - found.comparison.drop
            error = standard_error(found.comparison, stop)
            if left < -CLEARLY_OUT * error:
                break
        return Verdict(found.accuracy, found.comparison, left - error)


def doubling_looks(count: int) -> list[int]:
    """Return after how many of ``count`` images to look: FIRST_LOOK, twice as many, …, all."""
    looks = [FIRST_LOOK]
    while looks[-1] < count:
        looks.append(2 * looks[-1])
    return [*looks[:-1], count]


def why_too_strict(count: int, max_drop: float, held_out: bool = False) -> str | None:
    """Say why a candidate that loses and gains nothing could not pass; None where it can.

    It must leave the error of one image, so choosing takes 1/``max_drop`` images. ``count`` is the
    number of test images, of which half choose, or of held-out images, all of which do.
    """
    if max_drop == 0:
        return "a budget of 0 points leaves no standard error to spare"
    choosing = math.ceil(1 / max_drop - 1e-9)
    if count >= (choosing if held_out else 2 * choosing - 1):
        return None
    half = f"{2 * choosing:,} test images, of which half choose"
    needed = f"{choosing:,} held-out images" if held_out else half
    points = counted(100 * max_drop, "point")
    return f"to be within {points} with one standard error to spare takes {needed}, not {count:,}"


def why_too_few(count: int, max_drop: float) -> str | None:
    """Say why ``count`` images that confirm may leave the budget unproven; None where they may not.

    Even a network that loses nothing usually has an interval of about that width.
    """
    width = Z * math.sqrt(USUAL_FLIPS / count)
    if width <= max_drop:
        return None
    points = counted(100 * max_drop, "point")
    return (
        f"{counted(count, 'image')} to confirm with are few for {points}: where "
        f"{100 * USUAL_FLIPS:.1f} % of the images change between right and wrong, as with the "
        f"bundled network, a loss is known to ± {100 * width:.1f} points"
    )


def standard_error(comparison: Comparison, total: int) -> float:
    """Return the standard error of a paired difference of accuracies on ``total`` images.

    Where two models never disagree it is that of one image on which they would.
    """
    lost, gained = comparison.only_a_correct, comparison.only_b_correct
    variance = lost + gained - (lost - gained) ** 2 / total
    return math.sqrt(max(variance, 1.0)) / total
