"""How far the linear layers can be pruned: a binary search, and the sweep that checks its answer.

An answer is chosen because it is just within the tolerance on some images; on others it may not be.
So the choice is repeated on random halves of the images, each judged on the other half.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common.measure.evaluate import Accuracy
from pruning.alone.head import Head

SPLITS = 200


class SearchStep(NamedTuple):
    """A level that the binary search tried, its correct images, and whether those are enough."""

    level: int
    correct: int
    kept: bool


def required_correct(dense_correct: int, total: int, tolerance: float) -> int:
    """Return how many images must stay correct for accuracy to be within ``tolerance`` of dense."""
    return max(0, math.ceil(dense_correct - tolerance * total - 1e-9))


def binary_search(
    correct_at: Callable[[int], int], largest: int, required: int
) -> tuple[int, list[SearchStep]]:
    """Return the largest level that keeps ``required`` images correct, and the steps to it.

    Where correctness does not fall steadily, the answer still holds, but a larger one may exist:
    the sweep finds it. Level 0, nothing pruned, is not tried.
    """
    low, high, steps = 0, largest, []
    while low < high:
        level = (low + high + 1) // 2
        correct = correct_at(level)
        kept = correct >= required
        steps.append(SearchStep(level, correct, kept))
        low, high = (level, high) if kept else (low, level - 1)
    return low, steps


class Splits(NamedTuple):
    """Results of ``SPLITS`` random splits: one half chooses a level, the other half judges it."""

    levels: np.ndarray  # chosen levels, int64, (SPLITS,)
    drops: np.ndarray  # fraction of accuracy that each lost on its other half, (SPLITS,)
    within: int  # number of losses that are within the tolerance


def repeat_on_halves(correct: np.ndarray, tolerance: float, seed: int) -> Splits | None:
    """Repeat the binary search on a sweep's images, in random halves; None for fewer than two."""
    largest, total = correct.shape[0] - 1, correct.shape[1]
    half = total // 2
    if not half:
        return None
    rng = np.random.default_rng(seed)
    levels, drops = np.empty(SPLITS, np.int64), np.empty(SPLITS)
    for split in range(SPLITS):
        chooses, judges = np.split(rng.permutation(total), [half])

        def correct_at(level: int, images: np.ndarray = chooses) -> int:
            return int(correct[level, images].sum())

        required = required_correct(correct_at(0), half, tolerance)
        levels[split], _ = binary_search(correct_at, largest, required)
        lost = correct_at(0, judges) - correct_at(levels[split], judges)
        drops[split] = lost / len(judges)
    return Splits(levels, drops, int((drops <= tolerance + 1e-9).sum()))


@dataclass(frozen=True)
class LinearSearch:
    """Result of the search."""

    layers: tuple[str, ...]  # names of the layers that were pruned together, by the same amount
    counts: np.ndarray  # number of pruned weights at each level; int64, shape (levels + 1,)
    tolerance: float  # accuracy that may be lost, as a fraction
    found: int  # level that the binary search found
    steps: list[SearchStep]  # steps of the binary search
    required: int  # number of images that must stay correct, of ``images``
    images: int
    correct: np.ndarray  # number of correct images at each level; int64, shape (levels + 1,)
    splits: Splits | None  # results on random halves; None where there is only one image

    @property
    def largest(self) -> int:
        """The largest level within the tolerance, of all levels."""
        return int(np.flatnonzero(self.correct >= self.required)[-1])

    @property
    def is_monotone(self) -> bool:
        """Whether correctness never rises as more weights are pruned."""
        return bool((np.diff(self.correct) <= 0).all())

    def explain(self) -> str:
        """Say in one sentence how the binary search's answer and the true maximum relate."""
        if self.found == self.largest:
            return "the sweep over every possible amount confirms the binary search"
        first_failure = int(np.flatnonzero(self.correct < self.required)[0])
        return (
            f"accuracy is not monotone: it leaves the tolerance at {self.counts[first_failure]:,} "
            f"pruned weights and is within it again up to {self.counts[self.largest]:,}; a step of "
            "the binary search fell into the gap"
        )

    def as_dict(self) -> dict:
        """Return the ``linear_search`` object of results.json."""
        counts, amounts = self.counts.tolist(), (self.counts / self.counts[-1]).tolist()
        found = {
            "layers": list(self.layers),
            "tolerance": self.tolerance,
            "images": self.images,
            "dense": Accuracy(int(self.correct[0]), self.images).as_dict(),
            "max_amount": amounts[self.found],
            "pruned_weights": counts[self.found],
            "kept_weights": counts[-1] - counts[self.found],
            "steps": [
                {
                    "amount": amounts[step.level],
                    "pruned_weights": counts[step.level],
                    "accuracy": Accuracy(step.correct, self.images).as_dict(),
                    "kept": step.kept,
                }
                for step in self.steps
            ],
            "curve": np.stack([amounts, self.correct / self.images], axis=1).tolist(),
            "exhaustive_max_amount": amounts[self.largest],
            "monotone": self.is_monotone,
            "explanation": self.explain(),
        }
        if self.splits is not None:
            found["splits"] = {
                "splits": len(self.splits.drops),
                "within_tolerance": self.splits.within,
                "amount": _spread(self.counts[self.splits.levels] / self.counts[-1]),
                "drop": {**_spread(self.splits.drops), "mean": float(self.splits.drops.mean())},
            }
        return found


def _spread(values: np.ndarray) -> dict:
    """Return the median and the range of the middle 90 %."""
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
    return {"median": median, "middle90": [low, high]}


def search_linear(
    head: Head, features: torch.Tensor, labels: torch.Tensor, tolerance: float, seed: int
) -> LinearSearch:
    """Find how far the linear layers can be pruned together, and check that at every level.

    ``features`` are the layers' input for every image, FP32, (N, features), on the CPU.
    """
    sweep = head.sweep(features, labels)
    correct = sweep.sum(axis=1)
    required = required_correct(int(correct[0]), len(labels), tolerance)
    found, steps = binary_search(lambda level: int(correct[level]), head.levels, required)
    counts = np.array([sum(head.counts_at(level).values()) for level in range(head.levels + 1)])
    splits = repeat_on_halves(sweep, tolerance, seed)
    return LinearSearch(
        tuple(head.weights), counts, tolerance, found, steps, required, len(labels), correct, splits
    )
