"""What each layer contributes to the cost of INT8.

Noise is measured layer by layer on FP32 inputs, so that it is the layer's own: the signal-to-
quantization-noise ratio (SQNR) of its output with weights rounded, with activations rounded, with
both. It is the median over channels: in a plain ratio a few strong ones would hide that the others
drown.

Accuracy is measured with each layer alone in INT8, as a variant that branches off the FP32 network,
as in the pruning scan; and with it alone in FP32, as it would be deployed.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch

from common.command import cli
from common.images.data import ImageSet
from common.machine.device import bf16_pays
from common.measure import evaluate
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.execution import Layer, Network
from common.network.graph import Operation
from common.network.graph import evaluate as evaluate_graph
from quantization.int8 import engines
from quantization.int8.conversion import Observation, convert, quantize_layer
from quantization.int8.fusion import FusedOperation, fuse_activations
from quantization.int8.network import CLIPS, ValueRange
from quantization.settings import Settings

NOISE_IMAGES = 128
BRANCH_BATCH = 16  # images; the branches of more no longer fit a CPU's L3 cache
# A ratio beyond this is only rounding of FP32 itself.
MAX_SQNR_DB = 120.0


def diagnose(observation: Observation, settings: Settings, test: ImageSet, batch_size: int) -> dict:
    """Return results.json's ``diagnosis``: each layer's noise and accuracy cost, in network order.

    Beside it comes ``bf16``, if that ran: how many predictions FP32 decided again. Layers that
    ``settings`` keep in FP32 are measured as if they were in INT8.
    """
    settings, record = replace(settings, fp32_layers=()), Fp32Recheck()
    ranges = observation.ranges(settings.reduce_range)
    dense, only_quantized = scan_only_quantized(observation.network, ranges, test, record)
    only_fp32 = scan_only_fp32(observation, settings, test, batch_size)
    record.warn_if_near(advice="")
    rows = measure_noise(observation, settings.reduce_range)
    for row in rows:
        for name, alone in (("quantized", only_quantized), ("fp32", only_fp32)):
            row[f"drop_only_{name}"] = evaluate.compare(dense, alone[row["layer"]]).drop
    return {"diagnosis": rows} | ({"bf16": asdict(record)} if record.predictions else {})


def rank_layers(observation: Observation, reduce_range: bool) -> list[str]:
    """Return the layers by the noise that quantizing each makes, worst first."""
    noise = measure_noise(observation, reduce_range)
    return [row["layer"] for row in sorted(noise, key=operator.itemgetter("sqnr_db"))]


@torch.inference_mode()
def measure_noise(observation: Observation, reduce_range: bool) -> list[dict]:
    """Return each layer's signal-to-noise ratios in dB as results.json has them."""
    network, ranges = observation.network, observation.ranges(reduce_range)
    steps = {step.operation.name: step for step in fuse_activations(network.graph)}
    noise: list[dict] = []

    def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
        # Measured as the layers run: kept for later, their inputs would take 0.3 GB.
        if operation.is_layer:
            noise.append(_layer_noise(network, steps[operation.name], inputs[0], ranges))
        return network.compute(operation, inputs, operation.name in network.overwriting)

    images = observation.images.rows(slice(NOISE_IMAGES))
    given = {network.graph.input: images.normalize(images.images)}
    evaluate_graph(network.graph, compute, given, [network.graph.output])
    return noise


def _layer_noise(
    network: Network, step: FusedOperation, x: torch.Tensor, ranges: dict[str, ValueRange]
) -> dict:
    layer = network.layers[step.operation.name]
    rounded = quantize_layer(layer).dense()
    read, write = ranges[step.inputs[0]].round, ranges[step.name].round

    def run(x: torch.Tensor, layer: Layer) -> torch.Tensor:
        return CLIPS[step.activation](network.compute(step.operation, [x], layer=layer))

    signal = run(x, layer)
    return {
        "layer": step.operation.name,
        "sqnr_db": _sqnr_db(signal, write(run(read(x), rounded))),
        "weight_sqnr_db": _sqnr_db(signal, run(x, rounded)),
        "activation_sqnr_db": _sqnr_db(signal, write(run(read(x), layer))),
    }


def _sqnr_db(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """Return the median over channels (dimension 1) of the SQNR in dB; silent channels left out."""
    dims = [dim for dim in range(signal.ndim) if dim != 1]
    power = signal.square().mean(dim=dims)
    noise = (noisy - signal).square().mean(dim=dims)
    heard = power > 0
    ratios_db = 10 * torch.log10(power[heard] / noise[heard].clamp_min(1e-30))
    return min(float(ratios_db.median()), MAX_SQNR_DB) if len(ratios_db) else MAX_SQNR_DB


# --- accuracy -----------------------------------------------------------------------------------


@torch.inference_mode()
def scan_only_quantized(
    network: Network, ranges: Mapping[str, ValueRange], test: ImageSet, record: Fp32Recheck
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return per-image correctness (bool, (N,)): FP32's, and that with each layer alone in INT8.

    Where the CPU is made for bf16, branches run in it first; ``record`` counts FP32's corrections.
    """
    cascade = Cascade.of(network, fast=bf16_pays())
    exact = _variants(network, network, ranges)
    variants = Variants(
        exact, cascade.fast_network and _variants(network, cascade.fast_network, ranges)
    )
    if variants.fast:
        bounds = cascade.measure_bounds(test, variants, BRANCH_BATCH)
        variants = replace(variants, bounds=bounds)
    batches = cascade.walk(None, [variants], test, BRANCH_BATCH, record)
    count = math.ceil(len(test) / BRANCH_BATCH)
    dense, _, alone = zip(*cli.progress(batches, "diagnose: INT8", count), strict=True)
    return torch.cat(dense), dict(zip(exact, torch.cat(alone, dim=1), strict=True))


def scan_only_fp32(
    observation: Observation, settings: Settings, test: ImageSet, batch_size: int
) -> dict[str, torch.Tensor]:
    """Return per-image correctness (bool, (N,)) of INT8 with each layer alone in FP32."""
    correct = {}
    for name in observation.network.graph.layers:
        mixed = convert(observation, replace(settings, fp32_layers=(name,)))
        run = engines.runner(settings.engine, mixed)
        found = evaluate.predict(run, test, batch_size, f"diagnose: {name} in FP32")
        correct[name] = found == test.labels
    return correct


def _variants(
    network: Network, running: Network, ranges: Mapping[str, ValueRange]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return each layer alone in INT8, for ``running``, the network in the precision to run in."""

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
