"""The search for the strongest compression within the budget: each trial steers the next.

A trial may cost a minute or more, so there are few of them. They move on a logarithmic scale, where
the loss of accuracy bends least: outwards until one passes and one fails, then to where the line
through these two would use up the budget.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common.command.cli import counted, log
from common.search.budget import Verdict

MARGIN = 0.15  # an interpolated trial keeps this share of the bracket from either end


@dataclass(frozen=True)
class Trial:
    """A compressed network that was tried: its strength, on the scale of the search, and result."""

    strength: float
    verdict: Verdict

    @property
    def spare(self) -> float:
        """What is left of the budget; below zero it fails."""
        return self.verdict.spare


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True)
class Range:
    """Strengths among which to look for the strongest compression."""

    start: float  # strength of the first trial
    least: float  # smallest strength to try
    most: float  # largest strength to try
    resolution: float = 1.03  # smallest ratio of two strengths that are worth telling apart
    trials: int = 5  # largest number of trials; twice as many where none passes
    stride: float = 1.3  # ratio of successive strengths, until one trial passes and one fails


def run_trials(make: Callable[[float], T], where: Range) -> list[T]:
    """Make trials, each of the strength that follows from the others; return them in that order."""
    trials: list[T] = []
    strength: float | None = where.start
    while strength is not None and len(trials) < where.trials * (1 if strongest(trials) else 2):
        trials.append(make(strength))
        strength = next_strength(trials, where)
    if strength is not None and strongest(trials):
        tries = counted(len(trials), "network")
        log.info("the limit of %s is reached: one that is compressed more may pass too", tries)
    return trials


def next_strength(trials: Sequence[T], where: Range) -> float | None:
    """Return the strength to try after ``trials``; None where nothing is left to find out."""
    passing = strongest(trials)
    least = -math.inf if passing is None else passing.strength
    above = [trial for trial in trials if trial.spare < 0 and trial.strength > least]
    failing = min(above, key=lambda trial: trial.strength, default=None)
    if failing is None:
        following = min(passing.strength * where.stride, where.most)
        return following if following > passing.strength else None
    if passing is None:
        following = max(failing.strength / where.stride, where.least)
        return following if following < failing.strength else None
    bracket = math.log(failing.strength / passing.strength)
    apart = math.log(where.resolution)
    if bracket < 2 * apart:
        return None
    margin = max(MARGIN * bracket, apart)
    share = failing.spare / (failing.spare - passing.spare)  # fraction of the way to passing
    return failing.strength / math.exp(min(max(share * bracket, margin), bracket - margin))


def strongest(trials: Sequence[T]) -> T | None:
    """Return the strongest trial that passes; None where none does."""
    return max((t for t in trials if t.spare >= 0), key=lambda t: t.strength, default=None)


def nearest(trials: Sequence[T]) -> T:
    """Return the trial that is least over the budget: the best that there is where none passes."""
    return max(trials, key=lambda trial: trial.spare)
