"""The three answers: the smallest file, the fastest network, and the one that is both.

Each is the strongest candidate that the choosing half of the test images finds within the budget,
with a standard error to spare. What one search found is where the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.command import cli
from common.network.checkpoint import load_model
from pipeline.candidates import Candidate, Workshop
from pipeline.search import Range, find_strongest, nearest, strongest

GOALS = ("size", "speed", "both")
# In 1 / price; on the bundled weights the budget of one point ends near the start.
CODING = Range(start=1 / 0.03, least=1 / 0.5, most=1 / 0.001, resolution=1.1, trials=4)
WIDEST_SHARE, FIRST_SHARE = 0.97, 0.7
ROUNDING = 1 / 32  # widths come in steps: the very least share cannot be asked for
# Of the budget, what the slim network of the answer that is both may use; coding uses the rest.
SLIM_SHARE = 0.5
# What a trained network may be stronger by than one that is not; training takes the longest.
TRAINED_STRIDE, TRAINED_TRIALS = 1.4, 2


@dataclass(frozen=True)
class Answer:
    """The best candidate of a goal, and all that were tried for it.

    Attributes:
        goal: One of ``GOALS``.
        best: The strongest within the budget; where there is none, the one least over it.
        tried: In the order in which they were made.
    """

    goal: str
    best: Candidate
    tried: Sequence[Candidate]

    @property
    def passes(self) -> bool:
        """Whether it is within the budget on the images that chose it."""
        return self.best.verdict.passes


def find_answers(workshop: Workshop, goals: Sequence[str]) -> dict[str, Answer]:
    """Search for every goal; return the answers by goal, in the order of ``GOALS``."""
    answers: dict[str, Answer] = {}
    for goal in GOALS:
        if goal in goals:
            answers[goal] = _SEARCHES[goal](workshop, answers)
    return answers


def _find_size(workshop: Workshop, answers: dict[str, Answer]) -> Answer:
    def attempt(strength: float, trained: bool) -> Candidate:
        return workshop.try_coded("size", strength, workshop.dense, None, trained)

    return _search("size", attempt, CODING, workshop.training is not None)


def _find_speed(workshop: Workshop, answers: dict[str, Answer]) -> Answer:
    where = Range(
        FIRST_SHARE,
        least=workshop.least_share + ROUNDING,
        most=WIDEST_SHARE,
        resolution=1.03,
        trials=5,
    )
    return _search("speed", workshop.try_slim, where, workshop.training is not None)


def _find_both(workshop: Workshop, answers: dict[str, Answer]) -> Answer:
    """Code a slim network that leaves a part of the budget for it."""
    slim = answers.get("speed") or _find_speed(workshop, answers)
    allowed = SLIM_SHARE * workshop.budget.max_drop
    roomy = [c for c in slim.tried if c.verdict.passes and c.verdict.comparison.drop <= allowed]
    if roomy:
        base = min(roomy, key=lambda candidate: candidate.strength)
    else:  # wider than any so far
        base = workshop.try_slim((max(candidate.strength for candidate in slim.tried) + 1) / 2)
    model = load_model(base.slim_path)

    def attempt(strength: float, trained: bool) -> Candidate:
        return workshop.try_coded("both", strength, model, base.slim_path, trained)

    start = answers["size"].best.strength if "size" in answers else CODING.start
    where = Range(min(2 * start, CODING.most), CODING.least, CODING.most, CODING.resolution, 3)
    return _search("both", attempt, where, workshop.training is not None)


def _search(
    goal: str, attempt: Callable[[float, bool], Candidate], where: Range, trains: bool
) -> Answer:
    """Search without training; then train where that ended, as strong as training may allow.

    Args:
        goal: One of ``GOALS``.
        attempt: Makes the candidate of a strength, trained or not.
        where: To look without training.
        trains: Whether there are trained candidates.
    """
    tried = _try_all(goal, lambda strength: attempt(strength, False), where)
    if trains:
        reached = (strongest(tried) or nearest(tried)).strength
        start = max(reached / TRAINED_STRIDE, where.least)
        cli.log.info("%s: now with training", goal)
        further = Range(start, where.least, reached, where.resolution, TRAINED_TRIALS)
        tried = [*tried, *_try_all(goal, lambda strength: attempt(strength, True), further)]
    return Answer(goal, strongest(tried) or nearest(tried), tried)


def _try_all(goal: str, attempt: Callable[[float], Candidate], where: Range) -> list[Candidate]:
    """Search, saying what it is doing and how long it may take."""
    started = time.perf_counter()
    made = 0

    def told(strength: float) -> Candidate:
        nonlocal made
        if made:
            left = (where.trials - made) * (time.perf_counter() - started) / made
            cli.log.info("%s: at most %.0f s more", goal, left)
        made += 1
        return attempt(strength)

    cli.log.info("%s: at most %d networks are tried", goal, where.trials)
    return find_strongest(told, where)


_SEARCHES = {"size": _find_size, "speed": _find_speed, "both": _find_both}
