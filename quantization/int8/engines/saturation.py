"""Whether an engine adds products of 8-bit numbers exactly on the CPU at hand."""

from collections.abc import Callable

import torch

from common.network import graph as kinds
from common.network.graph import Graph, Operation
from quantization.int8.network import MAX_LEVEL, Int8Layer, Int8Network, ValueRange
from quantization.settings import Settings

FLOAT32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
CHANNELS = 64
LARGEST_WEIGHT = 127
EXPECTED_LEVEL = 200


def adds_exactly(make_runner: Callable[[Int8Network], Callable]) -> bool:
    """Return whether the layers of a network made ready on an engine add large products exactly.

    Without VNNI, x86 kernels add pairs of products in 16 bits, where large ones saturate. The CPU's
    flags do not tell which kernels run: ``ONEDNN_MAX_CPU_ISA`` may rule out those with VNNI.
    """
    run = make_runner(_largest_products())
    with torch.inference_mode():
        logits = run(torch.full((1, CHANNELS, 3, 3), MAX_LEVEL, **FLOAT32))
    return bool((logits.round() == EXPECTED_LEVEL).all())


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
    return Int8Network(graph, layers, {}, ranges, (), (), (), Settings())


def _layer(shape: tuple[int, ...], factor: float) -> Int8Layer:
    """Return a layer of the largest weights, which multiplies the mean of its inputs."""
    weight = torch.full(shape, LARGEST_WEIGHT, dtype=torch.int8, device="cpu")
    scale = factor / (LARGEST_WEIGHT * weight[0].numel())
    scales = torch.full((CHANNELS,), scale, **FLOAT32)
    return Int8Layer(weight, scales, torch.zeros_like(scales))
