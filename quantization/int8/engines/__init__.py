"""Engines run an INT8 network; all compute the same integers, up to one rounding.

Here: those that run on this CPU, what they can do, and the fastest of them.
"""

import functools
import importlib.util
import platform

import torch

from common.command import cli
from common.command.cli import UserError
from common.network import graph as kinds
from common.network.graph import Graph, Operation
from quantization.int8.engines.base import Int8Model
from quantization.int8.engines.fp32 import fp32_runner
from quantization.int8.engines.onnx_engines import OnnxRunner
from quantization.int8.engines.reference import ReferenceRunner
from quantization.int8.engines.torch_engine import TorchRunner, torch_engines
from quantization.int8.network import MAX_LEVEL, Int8Layer, Int8Network, ValueRange
from quantization.settings import ENGINES, TORCH_ENGINES, Settings

__all__ = ["fp32_runner"]  # handed on

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
RUNNERS = {
    **dict.fromkeys(TORCH_ENGINES, TorchRunner),
    **dict.fromkeys(PACKAGES, OnnxRunner),
    "reference": ReferenceRunner,
}
# The fastest of torch's engines on every x86 CPU that was tried, and the one that is made for Arm.
USUALLY_FASTEST = ("onednn", "x86", "fbgemm", "qnnpack")
# Of the network that probes for saturation.
CHANNELS, LARGEST_WEIGHT, EXPECTED_LEVEL = 64, 127, 200
FLOAT32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are


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
    """Return whether an engine's sums of 8-bit products saturate here, so that 7 bits are due.

    Without VNNI, x86 kernels add pairs of products in 16 bits, where large ones saturate. The CPU's
    flags do not tell which kernels run: ``ONEDNN_MAX_CPU_ISA`` may rule out those with VNNI.
    """
    run = runner(engine, _largest_products())
    with torch.inference_mode():
        logits = run(torch.full((1, CHANNELS, 3, 3), MAX_LEVEL, **FLOAT32))
    return bool((logits.round() != EXPECTED_LEVEL).any())


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


def _largest_products() -> Int8Network:
    """Return a network whose layers' sums are the largest that there are; its logits are known.

    Each layer returns the mean of its inputs, the last one a little less.
    """
    window = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    pool = window | {"kernel": [3, 3], "ceil": False}
    dense = window | {"groups": 1}
    depthwise = window | {"padding": [1, 1], "groups": CHANNELS}
    graph = Graph(
        (
            Operation("images", kinds.INPUT, (), {"shape": [CHANNELS, 3, 3]}),
            Operation("depthwise", kinds.CONVOLUTION, ("images",), depthwise),
            # The middle has no zeros of the padding in its sum.
            Operation("middle", kinds.MAX_POOL, ("depthwise",), pool),
            Operation("dense", kinds.CONVOLUTION, ("middle",), dense),
            Operation("flatten", kinds.FLATTEN, ("dense",)),
            Operation("linear", kinds.LINEAR, ("flatten",)),
        )
    )
    layers = {
        "depthwise": _layer((CHANNELS, 1, 3, 3), 1.0),
        "dense": _layer((CHANNELS, CHANNELS, 1, 1), 1.0),
        "linear": _layer((CHANNELS, CHANNELS), EXPECTED_LEVEL / MAX_LEVEL),
    }
    ranges = dict.fromkeys((o.name for o in graph.operations), ValueRange(1.0, 0))
    return Int8Network(graph, layers, ranges, (), (), (), Settings())


def _layer(shape: tuple[int, ...], factor: float) -> Int8Layer:
    """Return a layer of the largest weights, which multiplies the mean of its inputs."""
    weight = torch.full(shape, LARGEST_WEIGHT, dtype=torch.int8, device="cpu")
    scale = factor / (LARGEST_WEIGHT * weight[0].numel())
    scales = torch.full((CHANNELS,), scale, **FLOAT32)
    return Int8Layer(weight, scales, torch.zeros_like(scales))
