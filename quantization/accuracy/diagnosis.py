"""What each layer contributes to the cost of INT8.

Noise is measured layer by layer on FP32 inputs, so that it is the layer's own: the signal-to-
quantization-noise ratio of its output with weights rounded, with activations rounded, with both.
SQNR is the median over output channels, for in a plain ratio a few strong channels hide that the
others drown. Accuracy is measured by :mod:`quantization.accuracy.layer_cost`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from common.images.data import ImageSet, normalize
from common.measure import evaluate
from common.network.cascade import Fp32Recheck
from common.network.resnet import ResNet18, fold_batch_norm, hooked, prunable_layers
from quantization.accuracy import layer_cost
from quantization.accuracy.quantizers import Quantizer, layer_quantizers, quantize_weight
from quantization.bench import Bench
from quantization.settings import Settings

NOISE_IMAGES = 128
# A ratio beyond this is only rounding of FP32 itself.
MAX_SQNR_DB = 120.0


@dataclass(frozen=True)
class LayerNoise:
    """Signal-to-quantization-noise ratios of a layer's output in dB: the higher the better."""

    layer: str
    sqnr_db: float
    weight_sqnr_db: float
    activation_sqnr_db: float


def diagnose(model: ResNet18, observed: GraphModule, settings: Settings, bench: Bench) -> dict:
    """Return results.json's ``diagnosis``: each layer's noise and accuracy cost, in network order.

    Beside it ``bf16``, where that ran: how FP32 decided what bf16 could not. Noise is measured on
    calibration images, accuracy on the test images: ``drop_only_quantized`` is FP32's
    accuracy minus that with only this layer in INT8, ``drop_only_fp32`` minus that with all layers
    but this one in INT8; negative where INT8 happens to gain.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated.
        settings: Of the quantization.
        bench: The images that it was calibrated on, and those to measure accuracy on.
    """
    if settings.fp32_layers:  # of these it knows no ranges
        settings = replace(settings, fp32_layers=())
        observed = bench.calibrate(model, settings)
    test, record = bench.images, Fp32Recheck()
    dense, only_quantized = layer_cost.scan_only_quantized(model, observed, test, record)
    only_fp32 = layer_cost.scan_only_fp32(model, observed, settings, test, bench.batch_size)
    record.warn_if_near(advice="")
    rows = [
        asdict(noise)
        | {
            "drop_only_quantized": evaluate.compare(dense, only_quantized[noise.layer]).drop,
            "drop_only_fp32": evaluate.compare(dense, only_fp32[noise.layer]).drop,
        }
        for noise in measure_noise(model, observed, bench.calibration)
    ]
    return {"diagnosis": rows} | ({"bf16": asdict(record)} if record.predictions else {})


def rank_layers(model: ResNet18, observed: GraphModule, images: ImageSet) -> list[str]:
    """Return the layers by the noise that quantizing each makes, worst first."""
    noise = measure_noise(model, observed, images)
    return [entry.layer for entry in sorted(noise, key=lambda entry: entry.sqnr_db)]


@torch.inference_mode()
def measure_noise(model: ResNet18, observed: GraphModule, images: ImageSet) -> list[LayerNoise]:
    """Measure every layer's quantization noise on FP32 inputs.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated, which knows the activations' ranges.
        images: The first ``NOISE_IMAGES`` are used.

    Returns:
        One entry a layer, in network order.
    """
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
    quantizers = layer_quantizers(observed)
    noise: dict[str, LayerNoise] = {}

    def measure(name: str, layer: nn.Module, inputs: tuple[torch.Tensor], _: object) -> None:
        # As the layers run: kept for later, their inputs alone would take 0.3 GB.
        noise[name] = _layer_noise(name, layer, *inputs, *quantizers[name])

    with hooked(prunable_layers(folded), measure):
        folded(normalize(images.images[:NOISE_IMAGES]))
    return [noise[name] for name in quantizers]


def _layer_noise(
    name: str, layer: nn.Module, x: torch.Tensor, read: Quantizer, write: Quantizer
) -> LayerNoise:
    rounded_weight = quantize_weight(layer.weight)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        y = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        return y.relu_() if name.endswith("conv1") else y  # conv2 adds the shortcut first

    signal = run(x, layer.weight)
    return LayerNoise(
        name,
        sqnr_db=_sqnr_db(signal, write(run(read(x), rounded_weight))),
        weight_sqnr_db=_sqnr_db(signal, run(x, rounded_weight)),
        activation_sqnr_db=_sqnr_db(signal, write(run(read(x), layer.weight))),
    )


def _sqnr_db(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """Return the median over channels (dimension 1) of the SQNR in dB; silent channels left out."""
    dims = [dim for dim in range(signal.ndim) if dim != 1]
    power = signal.square().mean(dim=dims)
    noise = (noisy - signal).square().mean(dim=dims)
    heard = power > 0
    ratios_db = 10 * torch.log10(power[heard] / noise[heard].clamp_min(1e-30))
    return min(float(ratios_db.median()), MAX_SQNR_DB) if len(ratios_db) else MAX_SQNR_DB
