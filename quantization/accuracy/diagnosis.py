"""What each layer contributes to the cost of INT8.

Noise is measured layer by layer on FP32 inputs, so that it is the layer's own: the signal-to-
quantization-noise ratio (SQNR) of its output with weights rounded, with activations rounded, with
both. It is the median over output channels: in a plain ratio a few strong channels would hide that
the others drown. Accuracy is measured by :mod:`quantization.accuracy.layer_cost`.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from common.images.data import ImageSet
from common.measure import evaluate
from common.network.cascade import Fp32Recheck
from common.network.execution import Layer, Network
from common.network.graph import Operation
from common.network.graph import evaluate as evaluate_graph
from quantization.accuracy import layer_cost
from quantization.int8.conversion import Observation, quantize_layer
from quantization.int8.network import FusedOperation, ValueRange, fuse_activations
from quantization.settings import Settings

NOISE_IMAGES = 128
# A ratio beyond this is only rounding of FP32 itself.
MAX_SQNR_DB = 120.0
CLIPS = {None: lambda values: values, "relu": F.relu_, "relu6": lambda x: x.clamp_(0, 6)}


@dataclass(frozen=True)
class LayerNoise:
    """Signal-to-quantization-noise ratios of a layer's output in dB: the higher the better."""

    layer: str
    sqnr_db: float
    weight_sqnr_db: float
    activation_sqnr_db: float


def diagnose(observation: Observation, settings: Settings, test: ImageSet, batch_size: int) -> dict:
    """Return results.json's ``diagnosis``: each layer's noise and accuracy cost, in network order.

    Beside it comes ``bf16``, if that ran: how many predictions FP32 decided again. Noise is
    measured on calibration images, accuracy on the test images. ``drop_only_quantized`` is the
    accuracy lost with only this layer in INT8, ``drop_only_fp32`` with all layers but this one in
    INT8; negative if INT8 happens to gain. Layers that ``settings`` keep in FP32 are measured as if
    they were in INT8.
    """
    settings, record = replace(settings, fp32_layers=()), Fp32Recheck()
    ranges = observation.ranges(settings.reduce_range)
    dense, only_quantized = layer_cost.scan_only_quantized(
        observation.network, ranges, test, record
    )
    only_fp32 = layer_cost.scan_only_fp32(observation, settings, test, batch_size)
    record.warn_if_near(advice="")
    rows = [
        asdict(noise)
        | {
            "drop_only_quantized": evaluate.compare(dense, only_quantized[noise.layer]).drop,
            "drop_only_fp32": evaluate.compare(dense, only_fp32[noise.layer]).drop,
        }
        for noise in measure_noise(observation, settings.reduce_range)
    ]
    return {"diagnosis": rows} | ({"bf16": asdict(record)} if record.predictions else {})


def rank_layers(observation: Observation, reduce_range: bool) -> list[str]:
    """Return the layers by the noise that quantizing each makes, worst first."""
    noise = measure_noise(observation, reduce_range)
    return [entry.layer for entry in sorted(noise, key=lambda entry: entry.sqnr_db)]


@torch.inference_mode()
def measure_noise(observation: Observation, reduce_range: bool) -> list[LayerNoise]:
    """Return every layer's noise, in network order, on ``NOISE_IMAGES`` calibration images."""
    network, ranges = observation.network, observation.ranges(reduce_range)
    steps = {step.operation.name: step for step in fuse_activations(network.graph)}
    noise: list[LayerNoise] = []

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
) -> LayerNoise:
    layer = network.layers[step.operation.name]
    rounded = quantize_layer(layer).dense()
    read, write = ranges[step.inputs[0]].round, ranges[step.name].round

    def run(x: torch.Tensor, layer: Layer) -> torch.Tensor:
        return CLIPS[step.activation](network.compute(step.operation, [x], layer=layer))

    signal = run(x, layer)
    return LayerNoise(
        step.operation.name,
        sqnr_db=_sqnr_db(signal, write(run(read(x), rounded))),
        weight_sqnr_db=_sqnr_db(signal, run(x, rounded)),
        activation_sqnr_db=_sqnr_db(signal, write(run(read(x), layer))),
    )


def _sqnr_db(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """Return the median over channels (dimension 1) of the SQNR in dB; silent channels left out."""
    dims = [dim for dim in range(signal.ndim) if dim != 1]
    power = signal.square().mean(dim=dims)
    noise = (noisy - signal).square().mean(dim=dims)
    heard = power > 0
    ratios_db = 10 * torch.log10(power[heard] / noise[heard].clamp_min(1e-30))
    return min(float(ratios_db.median()), MAX_SQNR_DB) if len(ratios_db) else MAX_SQNR_DB
