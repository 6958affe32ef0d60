"""Which engines are here, what they can do, and which is the fastest for a batch size."""

from __future__ import annotations

import bisect
import functools
import importlib.util
import platform
from collections.abc import Mapping, Sequence

import torch

from common.command import cli
from common.command.cli import UserError
from common.measure.latency import Contender, Timing, time_interleaved
from quantization.int8.engines.base import Run, Runner
from quantization.int8.engines.saturation import adds_exactly
from quantization.int8.engines.switch import torch_engines
from quantization.int8.engines.torch_engine import TorchRunner
from quantization.int8.network import Int8Network
from quantization.int8.reference import ReferenceRunner
from quantization.settings import ENGINES, TORCH_ENGINES, Settings

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
# The fastest of torch's engines on every x86 CPU that was tried, and the one that is made for Arm.
USUALLY_FASTEST = ("onednn", "x86", "fbgemm", "qnnpack")


def available_engines() -> list[str]:
    """Return the engines that run here, in the order of ``ENGINES``."""
    return [name for name in ENGINES if not _missing(name)]


def require_engine(engine: str) -> None:
    """Check that an engine runs here.

    Raises:
        UserError: It does not; says which do, or which packages to install.
    """
    missing = _missing(engine)
    if engine in PACKAGES and missing:
        raise UserError(f"the engine {engine} needs more packages: pip install {missing}")
    if missing:
        available = ", ".join(available_engines())
        raise UserError(
            f"torch has no {engine} engine on this {platform.machine()} CPU; it has: {available}"
        )


def _missing(engine: str) -> str:
    """Return what an engine lacks here; nothing, if it runs."""
    if engine == "reference":
        return ""
    if engine in PACKAGES:
        return " ".join(name for name in PACKAGES[engine] if not importlib.util.find_spec(name))
    return "" if engine in torch_engines() else engine


class _Reference(Runner):
    """Runs an INT8 network in the reference's arithmetic."""

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return ReferenceRunner(self.network)(images)


def runner(engine: str, network: Int8Network) -> Runner:
    """Make a network ready on an engine.

    Raises:
        UserError: The engine does not run here.
    """
    require_engine(engine)
    if engine == "reference":
        return _Reference(network, engine)
    if engine in TORCH_ENGINES:
        return TorchRunner(network, engine)
    from quantization.int8.engines import onnx_engines  # it needs packages that may be missing

    return onnx_engines.RUNNERS[engine](network, engine)


@functools.cache
def saturates(engine: str) -> bool:
    """Return whether an engine's sums of 8-bit products saturate here, so that 7 bits are due."""
    return not adds_exactly(functools.partial(runner, engine))


def choose_settings(
    engine: str, observer: str = "histogram", reduce_range: str = "auto"
) -> Settings:
    """Return settings for the CPU at hand.

    Args:
        engine: One of ``ENGINES``.
        observer: One of ``OBSERVERS``.
        reduce_range: ``on``, ``off``, or ``auto``: on where products would saturate.

    Raises:
        UserError: The engine does not run here.
    """
    require_engine(engine)
    reduced = saturates(engine) if reduce_range == "auto" else reduce_range == "on"
    return Settings(engine, reduced, observer)


def candidate_engines() -> list[str]:
    """Return the engines worth measuring here.

    qnnpack, made for Arm, is one only where torch has nothing else; the reference never is.
    """
    left_out = {"reference"} | ({"qnnpack"} if len(torch_engines()) > 1 else set())
    return [name for name in available_engines() if name not in left_out]


def fastest_engine() -> str:
    """Return the one of torch's engines that is usually the fastest on this CPU.

    Raises:
        UserError: torch has none here.
    """
    for engine in USUALLY_FASTEST:
        if engine in torch_engines():
            return engine
    raise UserError(f"torch has no INT8 engine on this {platform.machine()} CPU")


def default_engines() -> list[str]:
    """Return fbgemm; where torch is built without it, as for Arm, what it has, said in one line."""
    if "fbgemm" in torch_engines():
        return ["fbgemm"]
    engine = "qnnpack" if "qnnpack" in torch_engines() else fastest_engine()
    cli.log.info("torch has no fbgemm on this %s CPU: using %s", platform.machine(), engine)
    return [engine]


# --- the fastest for each batch size --------------------------------------------------------------


def fastest_by_batch_size(timings: Mapping[str, Sequence[Timing]]) -> dict[int, str]:
    """Return for each batch size the engine whose median is the least.

    Args:
        timings: For each engine its timings, from
            :func:`common.measure.latency.time_interleaved`.
    """
    by_size: dict[int, dict[str, float]] = {}
    for engine, entries in timings.items():
        for timing in entries:
            by_size.setdefault(timing.batch_size, {})[engine] = timing.median_ms
    return {size: min(times, key=times.get) for size, times in by_size.items()}


class FastestRunner:
    """Runs each batch on the engine that was the fastest at the next measured batch size.

    Args:
        runners: For each measured batch size the runner to use.
    """

    def __init__(self, runners: Mapping[int, Run]):
        self._sizes = sorted(runners)
        self._runners = [runners[size] for size in self._sizes]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images to logits."""
        index = bisect.bisect_left(self._sizes, len(images))
        return self._runners[min(index, len(self._sizes) - 1)](images)


def choose_fastest(
    runners: Mapping[str, Run], images: torch.Tensor, batch_sizes: Sequence[int], seconds: float
) -> FastestRunner:
    """Time engines in turns and return a runner that takes the fastest for each batch size.

    Args:
        runners: The network on each engine, by the engine's name.
        images: Normalised images to run.
        batch_sizes: Batch sizes to compare at.
        seconds: Time to spend on each batch size.
    """
    contenders = [Contender(engine, run) for engine, run in runners.items()]
    timings = time_interleaved(contenders, images, batch_sizes, seconds)
    best = fastest_by_batch_size(timings)
    return FastestRunner({size: runners[engine] for size, engine in best.items()})
