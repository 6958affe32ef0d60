"""Engines, torch's families of INT8 kernels: which this CPU has, which to use, and using one."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Iterator

import torch

from common.command import cli
from common.command.cli import UserError
from common.machine import device
from quantization.settings import ENGINES, Settings

# Those whose kernels add pairs of 8-bit products in 16 bits without VNNI.
SATURATING_ENGINES = ("fbgemm", "x86", "onednn")
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


def saturates(engine: str) -> bool:
    """Return whether sums of 8-bit products saturate on the CPU at hand, so that 7 bits are due."""
    return engine in SATURATING_ENGINES and not device.has_vnni()


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


@contextlib.contextmanager
def quiet_torch(engine: str | None = None) -> Iterator[None]:
    """Silence torch's named warnings about quantization and, if given, choose the engine."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine or previous
    try:
        with warnings.catch_warnings():
            for message in TORCH_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.backends.quantized.engine = previous
