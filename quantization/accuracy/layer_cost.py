"""The accuracy that each layer's quantization costs: with it alone in INT8, with it alone in FP32.

Alone in INT8, a layer's variant branches off the FP32 network, as in the pruning scan. Alone in
FP32, the rest of the network runs on its engine, as it would be deployed.
"""

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
from common.network.execution import Network
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

    Branches run in bf16 first, where the CPU is made for it; what FP32 then decides again is added
    to ``record``.
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
    """Return per-image correctness (bool, (N,)) of INT8 with each layer alone in FP32."""
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
    """Return each layer as it is alone in INT8: it rounds its input and output in FP32.

    An output's range includes the activation behind it. ``running`` is the network in the precision
    to run in.
    """

    def alone(step: FusedOperation) -> Callable[[torch.Tensor], torch.Tensor]:
        name = step.operation.name
        rounded = quantize_layer(network.layers[name]).dense().to(running.layers[name].weight.dtype)
        read, write = ranges[step.inputs[0]].round, ranges[step.name].round

        def run(x: torch.Tensor) -> torch.Tensor:
            y = running.compute(step.operation, [read(x.float())], layer=rounded)
            return write(y.float()).to(y.dtype)

        return run

    layers = (step for step in fuse_activations(network.graph) if step.operation.is_layer)
    return {step.operation.name: alone(step) for step in layers}
