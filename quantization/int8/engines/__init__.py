"""Engines run an INT8 network; all compute the same integers, up to one rounding.

Here: those that run on this CPU, what they can do, and the fastest of them.
"""

import functools
import importlib.util
import platform

from common.command import cli
from common.command.cli import UserError
from quantization.int8.engines.base import Int8Model
from quantization.int8.engines.fp32 import fp32_runner
from quantization.int8.engines.onnx_engines import OnnxRuntimeRunner, OpenVinoRunner
from quantization.int8.engines.reference import ReferenceRunner
from quantization.int8.engines.saturation import adds_exactly
from quantization.int8.engines.torch_engine import TorchRunner, torch_engines
from quantization.int8.network import Int8Network
from quantization.settings import ENGINES, TORCH_ENGINES, Settings

__all__ = ["fp32_runner"]  # handed on

RUNNERS = {
    **dict.fromkeys(TORCH_ENGINES, TorchRunner),
    "onnxruntime": OnnxRuntimeRunner,
    "openvino": OpenVinoRunner,
    "reference": ReferenceRunner,
}
PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
# The fastest of torch's engines on every x86 CPU that was tried, and the one that is made for Arm.
USUALLY_FASTEST = ("onednn", "x86", "fbgemm", "qnnpack")


def available_engines() -> list[str]:
    """Return the engines that run here, in the order of ``ENGINES``."""
    return [name for name in ENGINES if not _missing(name)]


def require_engine(engine: str) -> None:
    """Raise a UserError unless an engine runs here; say which do, or which packages to install."""
    missing = _missing(engine)
    if engine in PACKAGES and missing:
        raise UserError(f"{engine} needs more packages: pip install {missing}")
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


def runner(engine: str, network: Int8Network) -> Int8Model:
    """Make a network ready on an engine, or raise a UserError if that does not run here."""
    require_engine(engine)
    return RUNNERS[engine](network, engine)


@functools.cache
def saturates(engine: str) -> bool:
    """Return whether an engine's sums of 8-bit products saturate here, so that 7 bits are due."""
    return not adds_exactly(functools.partial(runner, engine))


def choose_settings(
    engine: str, observer: str = "histogram", reduce_range: str = "auto"
) -> Settings:
    """Return settings for this CPU, or raise a UserError; ``auto``: 7 bits where sums saturate."""
    require_engine(engine)
    reduced = saturates(engine) if reduce_range == "auto" else reduce_range == "on"
    return Settings(engine, reduced, observer)


def candidate_engines() -> list[str]:
    """Return the engines worth measuring: not the reference, nor qnnpack if torch has others."""
    left_out = {"reference"} | ({"qnnpack"} if len(torch_engines()) > 1 else set())
    return [name for name in available_engines() if name not in left_out]


def fastest_engine() -> str:
    """Return torch's engine that is usually the fastest on this CPU; UserError if it has none."""
    for engine in USUALLY_FASTEST:
        if engine in torch_engines():
            return engine
    raise UserError(f"torch has no INT8 engine on this {platform.machine()} CPU")


def default_engines() -> list[str]:
    """Return fbgemm; where torch is built without it, as for Arm, another, which is logged."""
    if "fbgemm" in torch_engines():
        return ["fbgemm"]
    engine = "qnnpack" if "qnnpack" in torch_engines() else fastest_engine()
    cli.log.info("torch has no fbgemm on this %s CPU: using %s", platform.machine(), engine)
    return [engine]
