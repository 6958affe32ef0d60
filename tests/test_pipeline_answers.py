"""pipeline/answers.py: which candidate answers, and that every one that was made is listed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.measure.evaluate import Accuracy, Comparison
from common.search.budget import Verdict
from common.search.trials import Range
from pipeline import GOALS
from pipeline.answers import _best_to_code, choose_best, find_answers
from pipeline.candidates import Candidate
from pruning.channels.slimmer import STRIDE

MAX_DROP = 0.01


@dataclass(frozen=True)
class FakeCandidate(Candidate):
    """A candidate without a file."""

    bytes_: int = 1000

    @property
    def file_bytes(self) -> int:
        return self.bytes_


def candidate(
    goal="speed", strength=2.0, drop=0.0, spare=None, macs=100, file_bytes=1000, trained=False
):
    verdict = Verdict(
        Accuracy(0, 100), Comparison(drop, (drop, drop), 1.0, 0, 0),
        MAX_DROP - drop if spare is None else spare,
    )  # fmt: skip
    path = Path("slim.pth")
    return FakeCandidate(strength, verdict, goal, path, path, macs, trained, file_bytes)


def test_of_equally_fast_networks_the_better_one_answers():
    untrained, trained = candidate(drop=0.009), candidate(drop=0.001, trained=True)
    assert choose_best("speed", {"speed": [untrained, trained]}) is trained
    assert choose_best("speed", {"speed": [trained, untrained]}) is trained
    faster = candidate(drop=0.0099, macs=99)
    assert choose_best("speed", {"speed": [trained, faster]}) is faster
    failing = candidate(spare=-0.001, macs=1)
    assert choose_best("speed", {"speed": [trained, failing]}) is trained


def test_the_smallest_may_have_been_made_for_both():
    size, both = candidate("size", file_bytes=1000), candidate("both", file_bytes=900)
    assert choose_best("size", {"size": [size], "both": [both]}) is both
    size, both = candidate("size", spare=-0.02), candidate("both", spare=-0.01)
    assert choose_best("size", {"size": [size], "both": [both]}) is both  # the nearest


@dataclass
class FakeBuilder:
    """Makes candidates of which wide ones pass, and remembers them."""

    passes_from: float
    training: object = None
    made: list[Candidate] = field(default_factory=list)

    least_share: float = 0.1
    budget = SimpleNamespace(max_drop=MAX_DROP)

    @property
    def slimmer(self):
        return SimpleNamespace(
            costs=SimpleNamespace(least_share=lambda unit: self.least_share),
            search_range=lambda unit, max_drop: Range(1 / 0.6, 1 / 0.97, 1 / 0.1, trials=5),
            coding_range=lambda max_drop: Range(1 / 0.6, 1 / 0.97, 1 / 0.1, trials=1),
        )

    def try_slim(self, goal, share, unit="macs", trained=False):
        spare = share - self.passes_from + 0.1 * trained
        macs = round(1000 * share)
        made = candidate(goal, 1 / share, MAX_DROP / 2 - spare / 100, spare, macs, trained=trained)
        self.made.append(made)
        return made

    def coder(self, goal, base):
        def attempt(price):
            made = candidate(goal, price, spare=0.025 - price, trained=base.trained)
            self.made.append(made)
            return made

        return 0.028, attempt


@pytest.mark.parametrize("training", [None, "epochs"])
@pytest.mark.parametrize("goals", [["size"], ["speed"], ["both"], ["size", "speed"], GOALS])
@pytest.mark.parametrize("passes_from", [0.5, 0.98])
def test_every_network_that_was_made_is_listed(goals, training, passes_from):
    builder = FakeBuilder(passes_from, training)
    found = find_answers(builder, goals)
    assert list(found.best) == list(goals)
    assert sorted(map(id, found.tried)) == sorted(map(id, builder.made))
    assert any(one.trained for one in found.tried) == (training is not None)


def test_training_ends_with_the_first_network_that_passes():
    found = find_answers(FakeBuilder(0.5, "epochs"), ["speed"])
    assert [one.verdict.passes for one in found.tried if one.trained] == [True]


def test_no_network_narrower_than_possible_is_trained():
    found = find_answers(FakeBuilder(0.0, "epochs", least_share=0.25), ["speed"])
    assert [one.strength for one in found.tried if one.trained] == [4.0]


def best_to_code(*fast):
    return _best_to_code(FakeBuilder(0.5), fast)


def test_what_is_coded_promises_the_least_product_of_time_and_bytes():
    half_used = candidate(drop=0.005, macs=100, file_bytes=1000)
    # With half of the budget left, a file is 2 ** (1 / 1.6) = 1.54 times as large.
    assert best_to_code(half_used, slow := candidate(macs=153)) is slow
    assert best_to_code(half_used, candidate(macs=155)) is half_used
    assert best_to_code(half_used, large := candidate(file_bytes=1530)) is large
    assert best_to_code(half_used, candidate(file_bytes=1550)) is half_used
    assert best_to_code(half_used, candidate(macs=1, spare=-0.001)) is half_used
    assert best_to_code(candidate(spare=-0.001)) is None


@pytest.mark.parametrize("passes_from", [0.6, 0.98])
def test_where_the_widest_network_is_the_best_to_code_a_wider_one_is_tried(passes_from):
    builder = FakeBuilder(passes_from)
    find_answers(builder, ["both"])
    speed = [1 / one.strength for one in builder.made if one.goal == "speed"]
    assert speed[-1] == pytest.approx(min(max(speed[:-1]) * STRIDE, (max(speed[:-1]) + 1) / 2))
    assert speed[-1] == max(speed) < 1
