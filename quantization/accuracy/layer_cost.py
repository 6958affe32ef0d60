"""The accuracy that each layer's quantization costs: with it alone in INT8, with it alone in FP32.

Alone in INT8, a layer's variant branches off the FP32 network, as in the pruning scan. Alone in
FP32, the rest of the network runs on its engine, as it would be deployed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from common.command import cli
from common.images.data import ImageSet
from common.machine.device import bf16_pays
from common.measure.evaluate import predict
from common.network.branching import start_values
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.execution import Layer, Network
from quantization.int8 import engines
from quantization.int8.conversion import Observation, convert, quantize_layer
from quantization.int8.network import FusedOperation, ValueRange, fuse_activations
from quantization.settings import Settings

BRANCH_BATCH = 16  # images; the branches of more no longer fit a CPU's L3 cache


@torch.inference_mode()
def scan_only_quantized(
    network: Network, ranges: Mapping[str, ValueRange], test: ImageSet, record: Fp32Recheck
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return per-image correctness (bool, (N,)): FP32's, and that with each layer alone in INT8.

    Branches run in bf16 first, where the CPU is made for it.

    Args:
        network: FP32.
        ranges: Range of each value.
        test: Images to measure on.
        record: Counts of what FP32 decided again after bf16, which are added to.
    """
    cascade = Cascade.of(network, fast=bf16_pays())
    exact = _variants(network, network, ranges)
    fast = cascade.fast_network and _variants(network, cascade.fast_network, ranges)
    variants = Variants(exact, fast)
    bounds = cascade.measure_bounds(test, variants, BRANCH_BATCH) if fast else None
    graph, dense, alone = network.graph, [], []
    wanted = [*start_values(graph, exact), graph.output]
    count = math.ceil(len(test) / BRANCH_BATCH)
    for images, labels in cli.progress(test.batches(BRANCH_BATCH), "diagnose: INT8", count):
        values = network.run({graph.input: images}, wanted)
        dense.append(values[graph.output].argmax(dim=1) == labels)
        alone.append(cascade.predict(values, variants, bounds, record) == labels)
    by_layer = zip(exact, torch.cat(alone, dim=1), strict=True)
    return torch.cat(dense), dict(by_layer)


def scan_only_fp32(
    observation: Observation, settings: Settings, test: ImageSet, batch_size: int
) -> dict[str, torch.Tensor]:
    """Return per-image correctness (bool, (N,)) of INT8 with each layer alone in FP32.

    Args:
        observation: The FP32 network, observed.
        settings: How to quantize it.
        test: Images to measure on.
        batch_size: Number of images in a batch.
    """
    correct = {}
    for name in observation.network.graph.layers:
        mixed = convert(observation, replace(settings, fp32_layers=(name,)))
        run = engines.runner(settings.engine, mixed)
        found = predict(run, test, batch_size, f"diagnose: {name} in FP32")
        correct[name] = found == test.labels
    return correct


def _variants(
    network: Network, running: Network, ranges: Mapping[str, ValueRange]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return each layer as it is alone in INT8.

    Args:
        network: FP32.
        running: The same network in the precision to run in.
        ranges: Range of each value.
    """
    variants = {}
    for step in fuse_activations(network.graph):
        if step.operation.is_layer:
            name = step.operation.name
            layer, dtype = network.layers[name], running.layers[name].weight.dtype
            rounded = Layer(quantize_layer(layer).dense(), layer.bias).to(dtype)
            variants[name] = _quantized(running, rounded, step, ranges)
    return variants


def _quantized(
    network: Network, layer: Layer, step: FusedOperation, ranges: Mapping[str, ValueRange]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a layer that rounds its input and output: (N, C, H, W).

    Rounding happens in FP32, whatever the layer runs in. An output's range includes the activation
    behind it.
    """
    read, write = ranges[step.inputs[0]].round, ranges[step.name].round

    def run(x: torch.Tensor) -> torch.Tensor:
        y = network.compute(step.operation, [read(x.float())], layer=layer)
        return write(y.float()).to(y.dtype)

    return run
