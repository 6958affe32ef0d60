"""The three answers: the smallest file, the fastest network, and the one that is both.

Each is the best candidate that the choosing half of the test images finds within the budget, with
a standard error to spare. Channels go first, those that hold the most weights for size and those
that take the most multiply-adds for speed; what is left is coded with the rest of the budget.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.command import cli
from common.command.cli import counted
from common.search.trials import Range, nearest, run_trials, strongest
from pipeline import GOALS
from pipeline.candidates import Candidate, CandidateBuilder
from pruning.channels.costs import MACS, WEIGHTS
from pruning.channels.slimmer import CODING_EXPONENT, STRIDE

LEAST_PRICE, MOST_PRICE = 0.001, 5.0  # of a bit
# Training takes the longest, so it is tried where it is likely to end, and weaker if that fails:
# of the multiply-adds, shares smaller by so much than without it. After two epochs of 50,000 images
# 1.12 has passed and failed, 1.25 just failed.
TRAINED_STRIDES = (1.08, 1.04)


@dataclass(frozen=True)
class Found:
    """The answers, and all that was tried for them."""

    # By goal the best candidate within the budget; where there is none, the one least over it. In
    # the order of ``GOALS``.
    best: Mapping[str, Candidate]
    # Every candidate that was made, for goals that were not asked for as well.
    tried: Sequence[Candidate]


def find_answers(builder: CandidateBuilder, goals: Sequence[str]) -> Found:
    """Search for every goal."""
    tried: dict[str, list[Candidate]] = {}
    for goal in GOALS:
        if goal in goals:
            _SEARCHES[goal](builder, tried)
    if builder.training and "size" in goals and "both" not in goals:
        _find_both(builder, tried)  # trained networks, coded
    best = {goal: choose_best(goal, tried) for goal in GOALS if goal in goals}
    return Found(best, [candidate for goal in GOALS for candidate in tried.get(goal, [])])


def choose_best(goal: str, tried: Mapping[str, Sequence[Candidate]]) -> Candidate:
    """Return the best candidate of a goal: it may have been made for another one.

    Of equally fast, or equally small, ones it is the one that loses least.
    """
    candidates = tried[goal]
    if goal == "size":
        candidates = [*candidates, *tried.get("both", [])]
    passing = [candidate for candidate in candidates if candidate.verdict.passes]
    if not passing:
        return nearest(candidates)

    def cost(candidate: Candidate) -> tuple[int, float]:
        amount = candidate.macs if goal == "speed" else candidate.file_bytes
        return amount, candidate.verdict.comparison.drop

    return min(passing, key=cost)


def _find_size(builder: CandidateBuilder, tried: dict[str, list[Candidate]]) -> None:
    where = builder.slimmer.coding_range(builder.budget.max_drop)
    slim = _search_slim(builder, "size", WEIGHTS, where)
    base = strongest(slim) or nearest(slim)
    tried["size"] = [*slim, *_search_coded(builder, "size", base)]


def _find_speed(builder: CandidateBuilder, tried: dict[str, list[Candidate]]) -> None:
    where = builder.slimmer.search_range(MACS, builder.budget.max_drop)
    slim = _search_slim(builder, "speed", MACS, where)
    if builder.training:
        reached = 1 / (strongest(slim) or nearest(slim)).strength
        least = builder.slimmer.costs.least_share(MACS)
        for share in dict.fromkeys(max(reached / stride, least) for stride in TRAINED_STRIDES):
            cli.log.info("speed: training a network of %.0f %% of the multiply-adds", 100 * share)
            slim.append(builder.try_slim("speed", share, trained=True))
            if slim[-1].verdict.passes:
                break
    tried["speed"] = slim


def _find_both(builder: CandidateBuilder, tried: dict[str, list[Candidate]]) -> None:
    if "speed" not in tried:
        _find_speed(builder, tried)
    base = _best_to_code(builder, tried["speed"])
    untrained = [candidate for candidate in tried["speed"] if not candidate.trained]
    widest = min(untrained, key=lambda candidate: candidate.strength)
    if base in (None, widest):  # a wider one may be better still
        share = 1 / widest.strength
        tried["speed"].append(builder.try_slim("speed", min(share * STRIDE, (share + 1) / 2)))
        base = _best_to_code(builder, tried["speed"]) or tried["speed"][-1]
    tried["both"] = _search_coded(builder, "both", base)


def _best_to_code(builder: CandidateBuilder, fast: Sequence[Candidate]) -> Candidate | None:
    """Return the network within the budget that promises the least product of time and bytes.

    Coding uses up the budget that a network leaves, and its file grows as less is left: as the
    inverse of the power by which divergence grows as a file shrinks.
    """

    def product(candidate: Candidate) -> float:
        left = builder.budget.max_drop - candidate.verdict.comparison.drop
        return candidate.macs * candidate.file_bytes * left ** (-1 / CODING_EXPONENT)

    return min((one for one in fast if one.verdict.passes), key=product, default=None)


def _search_slim(builder: CandidateBuilder, goal: str, unit: str, where: Range) -> list[Candidate]:
    """Look for the least share of the ``unit`` within the budget."""
    return _try_all(goal, lambda times: builder.try_slim(goal, 1 / times, unit), where)


def _search_coded(builder: CandidateBuilder, goal: str, base: Candidate) -> list[Candidate]:
    """Look for the dearest bits that leave the network within the budget."""
    first, attempt = builder.coder(goal, base)
    first = min(max(first, LEAST_PRICE), MOST_PRICE)
    where = Range(first, LEAST_PRICE, MOST_PRICE, resolution=1.06, trials=4)
    return _try_all(goal, attempt, where)


def _try_all(goal: str, attempt: Callable[[float], Candidate], where: Range) -> list[Candidate]:
    """Search, saying what it is doing and how long it may take."""
    started = time.perf_counter()
    made = 0

    def make(strength: float) -> Candidate:
        nonlocal made
        if made:
            seconds = max(where.trials - made, 1) * (time.perf_counter() - started) / made
            cli.log.info("%s: about %.0f s more", goal, seconds)
        made += 1
        return attempt(strength)

    cli.log.info("%s: trying up to %s, more if none passes", goal, counted(where.trials, "network"))
    return run_trials(make, where)


_SEARCHES = {"size": _find_size, "speed": _find_speed, "both": _find_both}
