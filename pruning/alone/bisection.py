"""Binary search for the most that can be pruned, in counts of weights and of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One step of the binary search: ``count`` weights pruned, ``correct`` images; kept or not."""

    count: int
    correct: int
    kept: bool


def required_correct(dense_correct: int, total: int, tolerance: float) -> int:
    """Return how many images must stay correct for accuracy to be within ``tolerance`` of dense."""
    return max(0, math.ceil(dense_correct - tolerance * total - 1e-9))


def binary_search(
    correct_at: Callable[[int], int], largest: int, required: int
) -> tuple[int, list[Step]]:
    """Search the largest pruned count that keeps ``required`` images correct.

    Right where correctness falls steadily. Where it does not, the answer still holds but a larger
    one may exist: :func:`largest_within` finds it.

    Args:
        correct_at: Number of correct images for a number of pruned weights. Nothing pruned is
            taken to be within the tolerance.
        largest: The number of weights.
        required: Images that must stay correct.

    Returns:
        The count, and the steps that led to it.
    """
    low, high, steps = 0, largest, []
    while low < high:
        count = (low + high + 1) // 2
        correct = correct_at(count)
        kept = correct >= required
        steps.append(Step(count, correct, kept))
        low, high = (count, high) if kept else (low, count - 1)
    return low, steps


def largest_within(correct: np.ndarray, required: int) -> int:
    """Return the largest count whose entry of ``correct`` is at least ``required``."""
    return int(np.flatnonzero(correct >= required)[-1])
