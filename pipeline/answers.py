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
    def attempt(strength: float) -> Candidate:
        return workshop.try_coded("size", strength, workshop.dense, None)

    return _answer("size", attempt, CODING)


def _find_speed(workshop: Workshop, answers: dict[str, Answer]) -> Answer:
    where = Range(
        FIRST_SHARE,
        least=workshop.least_share + ROUNDING,
        most=WIDEST_SHARE,
        resolution=1.03,
        trials=5,
    )
    return _answer("speed", workshop.try_slim, where)


def _find_both(workshop: Workshop, answers: dict[str, Answer]) -> Answer:
    """Code a slim network that leaves a part of the budget for it."""
    slim = answers.get("speed") or _find_speed(workshop, answers)
    allowed = SLIM_SHARE * workshop.budget.max_drop
    roomy = [c for c in slim.tried if c.verdict.passes and c.verdict.comparison.drop <= allowed]
    base = min(roomy, key=lambda c: c.strength, default=None) or _widen(workshop, slim, allowed)
    model = load_model(base.slim_path)

    def attempt(strength: float) -> Candidate:
        return workshop.try_coded("both", strength, model, base.slim_path)

    start = answers["size"].best.strength if "size" in answers else CODING.start
    where = Range(min(2 * start, CODING.most), CODING.least, CODING.most, CODING.resolution, 3)
    return _answer("both", attempt, where)


def _widen(workshop: Workshop, slim: Answer, allowed: float) -> Candidate:
    """Try a wider network than any so far, for none of those leaves room for coding."""
    widest = max(candidate.strength for candidate in slim.tried)
    wider = workshop.try_slim((widest + 1) / 2)
    return wider


def _answer(goal: str, attempt: Callable[[float], Candidate], where: Range) -> Answer:
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
    tried = find_strongest(told, where)
    return Answer(goal, strongest(tried) or nearest(tried), tried)


_SEARCHES = {"size": _find_size, "speed": _find_speed, "both": _find_both}
