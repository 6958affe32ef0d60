"""Whether an engine adds products of 8-bit numbers exactly on the CPU at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.network.graph import CONVOLUTION, FLATTEN, INPUT, LINEAR, Graph, Operation
from quantization.int8.network import MAX_LEVEL, Int8Layer, Int8Network, ValueRange
from quantization.settings import Settings

CHANNELS = 64
LARGEST_WEIGHT = 127
EXPECTED_LEVEL = 200


def adds_exactly(make_runner: Callable[[Int8Network], Callable]) -> bool:
    """Return whether an engine's convolution and linear layer add the largest products exactly.

    Without VNNI, x86 kernels add pairs of products in 16 bits, where large ones saturate. The CPU's
    flags do not tell which kernels run: ``ONEDNN_MAX_CPU_ISA`` may rule out those with VNNI.

    Args:
        make_runner: Makes a network ready on the engine.
    """
    run = make_runner(_largest_products())
    with torch.inference_mode():
        logits = run(torch.full((1, CHANNELS, 1, 1), float(MAX_LEVEL)))
    return bool((logits.round() == EXPECTED_LEVEL).all())


def _largest_products() -> Int8Network:
    """Return a network whose layers' sums are the largest that there are; its logits are known."""
    settings = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    graph = Graph(
        (
            Operation("images", INPUT, (), {"shape": [CHANNELS, 1, 1]}),
            Operation("convolution", CONVOLUTION, ("images",), settings),
            Operation("flatten", FLATTEN, ("convolution",)),
            Operation("linear", LINEAR, ("flatten",)),
        )
    )
    weight = torch.full((CHANNELS, CHANNELS, 1, 1), LARGEST_WEIGHT, dtype=torch.int8)
    # Each layer returns the mean of its inputs, the last one a little less.
    scales = torch.full((CHANNELS,), 1 / (CHANNELS * LARGEST_WEIGHT))
    layer = Int8Layer(weight, scales, torch.zeros(CHANNELS))
    last = Int8Layer(weight.flatten(1), scales * (EXPECTED_LEVEL / MAX_LEVEL), layer.bias)
    ranges = dict.fromkeys((o.name for o in graph.operations), ValueRange(1.0, 0))
    layers = {"convolution": layer, "linear": last}
    return Int8Network(graph, layers, {}, ranges, (), (), (), Settings())
