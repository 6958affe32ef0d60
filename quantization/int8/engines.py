"""Engines, torch's families of INT8 kernels: which this CPU has, which to use, and using one."""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from common.command import cli
from common.command.cli import UserError
from quantization.settings import ENGINES, Settings

# Layers that show whether sums saturate: their inputs, their size, and what they must return.
MAX_ACTIVATION, MAX_WEIGHT = 255, 127
PROBE_CHANNELS = 64
EXPECTED_LEVEL = 200
TORCH_WARNINGS = (
    "torch.ao.quantization is deprecated",
    "Please use quant_min and quant_max",
    "torch.quantize_per_tensor, torch.quantize_per_channel",
    "TypedStorage is deprecated",
    "must run observer before calling calculate_qparams",
    "`torch.jit",
)


def choose_settings(
    engine: str, observer: str = "histogram", reduce_range: str = "auto"
) -> Settings:
    """Return settings for the CPU at hand.

    Args:
        engine: One of ``ENGINES``.
        observer: One of ``OBSERVERS``.
        reduce_range: ``on``, ``off``, or ``auto``: on where products would saturate.

    Raises:
        UserError: torch has no such engine on this CPU.
    """
    require_engine(engine)
    reduced = saturates(engine) if reduce_range == "auto" else reduce_range == "on"
    return Settings(engine, reduced, observer)


def require_engine(engine: str) -> None:
    """Check that torch has an engine on this CPU.

    Raises:
        UserError: It has not; says which it has.
    """
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        available = ", ".join(sorted(set(supported) - {"none"}))
        raise UserError(
            f"torch has no {engine} engine on this {platform.machine()} CPU; it has: {available}"
        )


@functools.cache
def saturates(engine: str) -> bool:
    """Return whether an engine's sums of 8-bit products saturate here, so that 7 bits are due.

    Without VNNI, x86 kernels add pairs of products in 16 bits. The CPU's flags do not tell which
    kernels run (``ONEDNN_MAX_CPU_ISA`` can rule out those with VNNI), so a convolution and a linear
    layer with a known sum are run, once a process and engine, in a few milliseconds.
    """
    kernels = torch.ops.quantized
    with quiet_torch(engine), torch.inference_mode():
        return not (
            _sums_exactly(kernels.linear, kernels.linear_prepack)
            and _sums_exactly(
                kernels.conv2d, kernels.conv2d_prepack, (1, 1), ([1, 1], [0, 0], [1, 1], 1)
            )
        )


def _sums_exactly(
    run: Callable, prepack: Callable, kernel_size: tuple[int, ...] = (), geometry: tuple = ()
) -> bool:
    """Return whether a layer of the set engine adds the largest products without an error."""
    channels = PROBE_CHANNELS
    weight = torch.quantize_per_channel(
        torch.full((channels, channels, *kernel_size), float(MAX_WEIGHT)),
        torch.ones(channels), torch.zeros(channels, dtype=torch.int64), 0, torch.qint8,
    )  # fmt: skip
    activations = torch.quantize_per_tensor(
        torch.full((1, channels, *kernel_size), float(MAX_ACTIVATION)), 1.0, 0, torch.quint8
    )
    scale = channels * MAX_ACTIVATION * MAX_WEIGHT / EXPECTED_LEVEL
    levels = run(activations, prepack(weight, None, *geometry), scale, 0).int_repr()
    return bool((levels == EXPECTED_LEVEL).all())


def candidate_engines() -> list[str]:
    """Return the engines worth measuring on this CPU; qnnpack, made for Arm, only where alone."""
    supported = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
    return [name for name in supported if name != "qnnpack"] or supported


def fastest_engine() -> str:
    """Return the engine that is the fastest on this CPU.

    Raises:
        UserError: torch has none here.
    """
    candidates = candidate_engines()
    if not candidates:
        raise UserError(f"torch has no INT8 engine on this {platform.machine()} CPU")
    return candidates[-1]


def default_engines() -> list[str]:
    """Return fbgemm; where torch is built without it, as for Arm, what it has, said in one line."""
    supported = torch.backends.quantized.supported_engines
    if "fbgemm" in supported:
        return ["fbgemm"]
    engine = "qnnpack" if "qnnpack" in supported else fastest_engine()
    cli.log.info("torch has no fbgemm on this %s CPU: using %s", platform.machine(), engine)
    return [engine]


class _EngineTurns:
    """Lets threads take turns with torch's engine, of which a process has one.

    Calls on the same engine run at the same time. A call on another engine waits for them, and so
    does whatever needs torch for itself.
    """

    def __init__(self):
        self._arrivals = threading.Lock()  # held while waiting: who comes later queues behind
        self._changed = threading.Condition()
        self._depths: Counter[int] = Counter()  # turns within turns, by thread
        self._exclusive_turns = 0

    @contextlib.contextmanager
    def take(self, engine: str | None, exclusive: bool) -> Iterator[None]:
        """Run a block on an engine, or on the one that is set; the engine stays set."""
        thread = threading.get_ident()
        with contextlib.nullcontext() if thread in self._depths else self._arrivals, self._changed:
            self._changed.wait_for(lambda: self._is_free(thread, engine, exclusive))
            if engine not in (None, torch.backends.quantized.engine):
                torch.backends.quantized.engine = engine
            self._depths[thread] += 1
            self._exclusive_turns += exclusive
        try:
            yield
        finally:
            with self._changed:
                self._exclusive_turns -= exclusive
                self._depths[thread] -= 1
                if not self._depths[thread]:
                    del self._depths[thread]
                self._changed.notify_all()

    def _is_free(self, thread: int, engine: str | None, exclusive: bool) -> bool:
        if self._depths.keys() <= {thread}:
            return True
        shared = not exclusive and not self._exclusive_turns
        return shared and engine in (None, torch.backends.quantized.engine)


_turns = _EngineTurns()


def running_on(engine: str) -> contextlib.AbstractContextManager[None]:
    """Run INT8 kernels on an engine, which stays set; safe in several threads."""
    return _turns.take(engine, exclusive=False)


@contextlib.contextmanager
def quiet_torch(engine: str | None = None) -> Iterator[None]:
    """Silence torch's named warnings about quantization and, if given, choose the engine.

    No other thread runs or prepares an INT8 model meanwhile: the engine and the filters of warnings
    are the whole process's, and tracing in two threads can crash.
    """
    with _turns.take(None, exclusive=True):
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine or previous
        try:
            with warnings.catch_warnings():
                for message in TORCH_WARNINGS:
                    warnings.filterwarnings("ignore", message=message)
                yield
        finally:
            torch.backends.quantized.engine = previous
