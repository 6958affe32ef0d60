"""Fair timing: several models on the same inputs and threads, interleaved round by round.

The speed of a shared machine changes within seconds. Models that take turns see the same changes,
so the *ratio* of their medians is reliable where a single time is not.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common.command import cli

# The previous model's threads spin for some milliseconds on cores that the next model needs. This
# pause lets them fall asleep.
SETTLE_SECONDS = 0.005
# Duration of the untimed calls before each timed one, at least one call. They wake the model's
# threads and bring its weights back into the caches.
UNTIMED_MS = 20.0
MIN_ROUNDS, MAX_ROUNDS = 3, 200
ORDER_SEED = 0
NOISY_SPREAD = 0.20  # interquartile range over median, above which a ratio of medians means little


@dataclass(frozen=True)
class Contender:
    """A model to time: ``run`` maps a float32 batch (N, C, H, W) in ``memory_format`` to logits.

    ``run`` returns when the result is ready: on a GPU it synchronises.
    """

    name: str
    run: Callable[[torch.Tensor], object]
    memory_format: torch.memory_format = torch.channels_last


@dataclass(frozen=True)
class Timing:
    """One model at one batch size; times are for one call on the whole batch."""

    batch_size: int
    median_ms: float
    iqr_ms: float
    images_per_second: float
    rounds: int

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is so large that ratios with this timing mean little."""
        return self.iqr_ms > NOISY_SPREAD * self.median_ms

    def as_dict(self) -> dict:
        """Return the entry of results.json's ``latency``."""
        return {**asdict(self), "noisy": self.is_noisy}


def time_interleaved(
    contenders: Sequence[Contender], images: torch.Tensor, batch_sizes: Sequence[int],
    seconds_per_batch_size: float = 5.0,
) -> dict[str, list[Timing]]:  # fmt: skip
    """Time every contender at every batch size; warn where the spread is large.

    They take turns in another random order each round, for at least ``MIN_ROUNDS`` rounds.
    ``images``, normalised, are repeated where a batch needs more. Return timings by name, one for
    each batch size.
    """
    timings = {contender.name: [] for contender in contenders}
    with torch.inference_mode():
        for contender in contenders:  # the first call may compile or prepare
            contender.run(_batch(images, batch_sizes[0], contender.memory_format))
    for batch_size in batch_sizes:
        samples_ms = _sample(contenders, images, batch_size, seconds_per_batch_size)
        for name, values in samples_ms.items():
            low, median_ms, high = statistics.quantiles(values, n=4, method="inclusive")
            rate = 1000 * batch_size / median_ms
            timing = Timing(batch_size, median_ms, high - low, rate, len(values))
            timings[name].append(timing)
    every = [timing for entries in timings.values() for timing in entries]
    if noisy := sum(timing.is_noisy for timing in every):
        cli.log.warning(
            "%d of %s varied by more than %.0f %%, as where other programs run: they are marked "
            "with ?, and their ratios mean little",
            noisy, cli.counted(len(every), "time"), 100 * NOISY_SPREAD,
        )  # fmt: skip
    return timings


@torch.inference_mode()
def _sample(
    contenders: Sequence[Contender], images: torch.Tensor, batch_size: int, seconds: float
) -> dict[str, list[float]]:
    formats = {contender.memory_format for contender in contenders}
    inputs = {layout: _batch(images, batch_size, layout) for layout in formats}
    samples_ms = {c.name: [] for c in contenders}
    orders = np.random.default_rng(ORDER_SEED)
    rounds, start = 0, 0
    with cli.progress(None, f"time batch {batch_size}", unit="round") as bar:
        while rounds < MIN_ROUNDS or (
            rounds < MAX_ROUNDS and time.perf_counter_ns() - start < 1e9 * seconds
        ):
            for contender in (contenders[i] for i in orders.permutation(len(contenders))):
                batch = inputs[contender.memory_format]
                time.sleep(SETTLE_SECONDS)
                untimed_ms = _call_ms(contender, batch)
                while untimed_ms < UNTIMED_MS:
                    untimed_ms += _call_ms(contender, batch)
                samples_ms[contender.name].append(_call_ms(contender, batch))
            rounds += 1
            bar.update()
            if rounds == 1:  # it may have included preparation for this batch size
                start = time.perf_counter_ns()
    return samples_ms


def _batch(images: torch.Tensor, size: int, layout: torch.memory_format) -> torch.Tensor:
    if size > len(images):
        images = images.repeat(-(-size // len(images)), 1, 1, 1)
    batch = images[:size]
    return torch.empty_like(batch, memory_format=layout).copy_(batch)


def _call_ms(contender: Contender, batch: torch.Tensor) -> float:
    start = time.perf_counter_ns()
    contender.run(batch)
    return (time.perf_counter_ns() - start) / 1e6


def speedups(own: Sequence[dict], **others: Sequence[dict]) -> list[dict]:
    """Return the ratio of others' median times to a model's, by their names, at each batch size."""
    found = []
    for timing, *slower in zip(own, *others.values(), strict=True):
        ratios = [other["median_ms"] / timing["median_ms"] for other in slower]
        entry = {"batch_size": timing["batch_size"]} | dict(zip(others, ratios, strict=True))
        found.append(entry | {"noisy": any(one["noisy"] for one in (timing, *slower))})
    return found
