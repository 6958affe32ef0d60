"""Interleaved timing, on a clock that moves only when a contender says so."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from common.command import cli
from common.measure import latency
from common.measure.latency import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Contender,
    Timing,
    time_interleaved,
)


class Clock:
    """Stand in for ``time.perf_counter_ns``; each call of a contender takes the time it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now_ns = 0
        self.calls: list[tuple[str, torch.Tensor]] = []
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(latency, "SETTLE_SECONDS", 0)
        monkeypatch.setattr(latency, "UNTIMED_MS", 0)

    def sleep(self, seconds: float) -> None:
        self.now_ns += int(1e9 * seconds)

    def contender(self, name: str, *durations_ms: float, **options: object) -> Contender:
        """Make a contender whose rounds take the durations in turns.

        A round is two calls here: one that is not timed and takes a millisecond more.
        """
        count = 0

        def run(batch: torch.Tensor) -> None:
            nonlocal count
            index, timed = divmod(count - 1, 2)  # the first is warm-up
            self.now_ns += int(1e6 * (durations_ms[index % len(durations_ms)] + (not timed)))
            self.calls.append((name, batch))
            count += 1

        return Contender(name, run, **options)

    def timed_order(self, contenders: int) -> list[str]:
        names = [name for name, _ in self.calls[contenders:]]
        assert names[::2] == names[1::2]
        return names[::2]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


IMAGES = torch.arange(4 * 3 * 4, dtype=torch.float32).view(4, 3, 2, 2)


def test_contenders_take_turns_in_another_order_each_round(clock):
    contenders = [clock.contender(name, 9.5) for name in "abc"]
    time_interleaved(contenders, IMAGES, batch_sizes=[1], seconds_per_batch_size=3.54)
    order = "".join(clock.timed_order(3))
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(rounds) == 60
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    follows_a = [after for before, after in pairwise(order) if before == "a"]
    assert {"b", "c"} <= set(follows_a)
    assert 0.3 < follows_a.count("b") / len(follows_a) < 0.7  # rotated, it would be 1.0

    first, clock.calls = clock.timed_order(3), []
    time_interleaved(
        [clock.contender(name, 9.5) for name in "abc"], IMAGES, [1], seconds_per_batch_size=3.54
    )
    assert clock.timed_order(3) == first


@pytest.mark.parametrize("duration_ms", [1, 19, 20, 500])
def test_the_call_that_is_timed_never_is_the_first(clock, monkeypatch, duration_ms):
    """However long a model takes, so that none is timed cold and another warm."""
    monkeypatch.setattr(latency, "UNTIMED_MS", 20)
    now, cold = clock.contender("model", duration_ms), []

    def run(batch: torch.Tensor) -> None:
        if cold:
            clock.now_ns += int(1e9)
            cold.clear()
        now.run(batch)

    monkeypatch.setattr(time, "sleep", lambda seconds: cold.append(True))
    (timing,) = time_interleaved([Contender("model", run)], IMAGES, [1], 0)["model"]
    assert timing.median_ms < duration_ms + 2


def test_each_is_called_once_before_all(clock):
    contenders = [clock.contender(name, 10) for name in "ab"]
    time_interleaved(contenders, IMAGES, [1, 3], 0)
    assert [(name, len(batch)) for name, batch in clock.calls[:2]] == [("a", 1), ("b", 1)]
    sizes = [len(batch) for _, batch in clock.calls[2:]]
    assert sizes == [1] * 4 * MIN_ROUNDS + [3] * 4 * MIN_ROUNDS


def test_a_short_call_is_timed_after_a_pause_and_enough_untimed_ones(clock, monkeypatch):
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.005)
    monkeypatch.setattr(latency, "UNTIMED_MS", 20)
    calls = []

    def run(batch: torch.Tensor) -> None:
        calls.append(clock.now_ns)
        clock.now_ns += int(9e6)

    (timing,) = time_interleaved([Contender("short", run)], IMAGES, [1], 0)["short"]
    assert timing.median_ms == 9
    assert len(calls) == 1 + 4 * MIN_ROUNDS  # three of them fill 20 ms
    pauses = [(b - a) / 1e6 - 9 for a, b in pairwise(calls[1:])]
    assert pauses[3::4] == [5.0] * (MIN_ROUNDS - 1)
    assert sum(pauses) == 5.0 * (MIN_ROUNDS - 1)


def test_median_and_interquartile_range(clock):
    # Seven rounds: median 4, quartiles 2.5 and 5.5 (linear between neighbours).
    slow = clock.contender("slow", 7, 1, 6, 2, 5, 3, 4)
    steady = clock.contender("steady", 2)
    # The six after the first take 2 × 21 + 6 ms and 6 × 5 ms.
    timings = time_interleaved([slow, steady], IMAGES, [2], seconds_per_batch_size=0.078)
    assert timings["slow"] == [Timing(2, 4.0, 3.0, 500.0, 7)]
    assert timings["steady"] == [Timing(2, 2.0, 0.0, 1000.0, 7)]
    assert timings["slow"][0].as_dict() == {
        "batch_size": 2, "median_ms": 4.0, "iqr_ms": 3.0, "images_per_second": 500.0, "rounds": 7,
        "noisy": True,
    }  # fmt: skip


@pytest.mark.parametrize(("seconds", "rounds"), [(0, MIN_ROUNDS), (1.05, 51), (1e6, MAX_ROUNDS)])
def test_rounds_fill_the_time(clock, seconds, rounds):
    (timing,) = time_interleaved([clock.contender("a", 10)], IMAGES, [1], seconds)["a"]
    assert timing.rounds == rounds


def test_preparing_for_a_batch_size_costs_no_rounds(clock):
    quick, met = clock.contender("model", 10), set()

    def run(batch: torch.Tensor) -> None:
        if len(batch) not in met:
            clock.now_ns += int(5e9)
        met.add(len(batch))
        quick.run(batch)

    timings = time_interleaved([Contender("model", run)], IMAGES, [1, 2], 1.05)["model"]
    assert [timing.rounds for timing in timings] == [51, 51]
    assert [timing.median_ms for timing in timings] == [10, 10]


def test_a_wide_spread_is_warned_of_once(clock, capsys):
    cli.set_up_messages(quiet=True)
    contenders = [clock.contender("noisy", 10, 20, 30), clock.contender("calm", 10, 10.5, 11)]
    timings = time_interleaved(contenders, IMAGES, [1], 0)
    assert timings["noisy"][0].is_noisy
    assert not timings["calm"][0].is_noisy
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "1 of 2 times varied by more than 20 %" in line


def test_batches_repeat_the_images_and_have_the_layout_asked_for(clock):
    contenders = [
        clock.contender("last", 1),
        clock.contender("plain", 1, memory_format=torch.contiguous_format),
    ]
    time_interleaved(contenders, IMAGES, batch_sizes=[1, 6], seconds_per_batch_size=0)
    batches = {(name, len(batch)): batch for name, batch in clock.calls}
    assert set(batches) == {("last", 1), ("last", 6), ("plain", 1), ("plain", 6)}
    for (name, size), batch in batches.items():
        assert torch.equal(batch, torch.cat([IMAGES, IMAGES])[:size])
        wanted = torch.channels_last if name == "last" else torch.contiguous_format
        assert batch.is_contiguous(memory_format=wanted)
