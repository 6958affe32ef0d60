"""The search for the strongest compression within the budget: each trial steers the next.

A trial costs a minute or more, so there are few of them. They move on a logarithmic scale, where
the loss of accuracy bends least: outwards until one passes and one fails, then to where the line
through these two would use up the budget.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.candidates import Candidate

Spare = Callable[[Candidate], float]  # what a trial leaves of a budget; below zero it fails
of_budget: Spare = operator.attrgetter("spare")
STRIDE = 1.3  # outwards
MARGIN = 0.15  # of the bracket, which an interpolated trial keeps from either end


@dataclass(frozen=True)
class Range:
    """Where to look: how much is kept, of coding 1 / price of a bit, of channels a share.

    Attributes:
        start: The first trial.
        least: The strongest compression to try.
        most: The weakest.
        resolution: Trials whose ratio is below this are not told apart.
        trials: At most so many; where none of them passes, as many again.
    """

    start: float
    least: float
    most: float
    resolution: float = 1.03
    trials: int = 5


def run_trials(
    make: Callable[[float], Candidate], where: Range, spare: Spare = of_budget
) -> list[Candidate]:
    """Make trials, and return all of them in the order in which they were made.

    Args:
        make: Returns the trial that keeps so much.
        where: To look.
        spare: Which of them fail.
    """
    trials: list[Candidate] = []
    kept: float | None = where.start
    while kept is not None:
        enough = where.trials * (1 if strongest(trials, spare) else 2)
        if len(trials) >= enough:
            break
        trials.append(make(kept))
        kept = next_kept(trials, where, spare)
    return trials


def next_kept(trials: Sequence[Candidate], where: Range, spare: Spare = of_budget) -> float | None:
    """Return what to try after ``trials``; None where nothing is left to find out."""
    passing = strongest(trials, spare)
    failing = max(
        (t for t in trials if spare(t) < 0 and (passing is None or t.kept < passing.kept)),
        key=lambda t: t.kept,
        default=None,
    )
    if failing is None:
        following = max(passing.kept / STRIDE, where.least)
        return following if following < passing.kept else None
    if passing is None:
        following = min(failing.kept * STRIDE, where.most)
        return following if following > failing.kept else None
    bracket = math.log(passing.kept / failing.kept)
    apart = math.log(where.resolution)
    if bracket < 2 * apart:
        return None
    margin = max(MARGIN * bracket, apart)
    share = spare(failing) / (spare(failing) - spare(passing))  # of the way from failing
    return failing.kept * math.exp(min(max(share * bracket, margin), bracket - margin))


def strongest(trials: Sequence[Candidate], spare: Spare = of_budget) -> Candidate | None:
    """Return the strongest trial that passes; None where none does."""
    return min((t for t in trials if spare(t) >= 0), key=lambda t: t.kept, default=None)


def nearest(trials: Sequence[Candidate]) -> Candidate:
    """Return the trial that is least over the budget: the best that there is where none passes."""
    return max(trials, key=of_budget)
