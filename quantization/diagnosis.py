"""What each layer contributes to the cost of INT8.

Noise is measured layer by layer on FP32 inputs, so that it is the layer's own: the signal-to-
quantization-noise ratio of its output with weights rounded, with activations rounded, with both.
Accuracy is measured twice: with only that layer quantized (branches off the FP32 network, as in the
pruning scan) and with only that layer kept in FP32 (real INT8 models). SQNR is the median over
output channels, for in a plain ratio a few strong channels hide that the others drown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from common import cli, evaluate
from common.branching import ALL_ROWS, Convolution, FoldedNetwork, branch_logits, trace_dense
from common.data import Cifar10, batches, normalize
from common.model import ResNet18, fold_batch_norm, prunable_layers
from quantization import engines
from quantization.engines import Quantizer, Settings

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


@dataclass(frozen=True)
class LayerCost:
    """Accuracy lost, as fractions of images; negative where INT8 happens to gain.

    Attributes:
        layer: Its name.
        drop_only_quantized: FP32's accuracy minus that with only this layer in INT8.
        drop_only_fp32: FP32's accuracy minus that with all layers but this one in INT8.
    """

    layer: str
    drop_only_quantized: float
    drop_only_fp32: float


def diagnose(
    model: ResNet18,
    observed: GraphModule,
    settings: Settings,
    calibration: Cifar10,
    test: Cifar10,
    batch_size: int,
) -> list[dict]:
    """Return results.json's ``diagnosis``: each layer's noise and accuracy cost, in network order.

    Noise is measured on calibration images, accuracy on ``test``.
    """
    costs = {c.layer: c for c in measure_costs(model, observed, settings, test, batch_size)}
    noise = measure_noise(model, observed, calibration)
    return [asdict(entry) | asdict(costs[entry.layer]) for entry in noise]


def rank_layers(model: ResNet18, observed: GraphModule, images: Cifar10) -> list[str]:
    """Return the layers by the noise that quantizing each makes, worst first."""
    noise = measure_noise(model, observed, images)
    return [entry.layer for entry in sorted(noise, key=lambda entry: entry.sqnr_db)]


@torch.inference_mode()
def measure_noise(model: ResNet18, observed: GraphModule, images: Cifar10) -> list[LayerNoise]:
    """Measure every layer's quantization noise on FP32 inputs.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated, which knows the activations' ranges.
        images: The first ``NOISE_IMAGES`` are used.

    Returns:
        One entry a layer, in network order.
    """
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in prunable_layers(folded).items()
    ]
    folded(normalize(images.images[:NOISE_IMAGES]))
    for hook in hooks:
        hook.remove()
    return [
        _layer_noise(name, folded.get_submodule(name), inputs[name], *quantizers)
        for name, quantizers in engines.layer_quantizers(observed).items()
    ]


def _layer_noise(
    name: str, layer: nn.Module, x: torch.Tensor, read: Quantizer, write: Quantizer
) -> LayerNoise:
    rounded_weight = engines.quantize_weight(layer.weight)

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


@dataclass(frozen=True)
class QuantizedConvolution:
    """A convolution of the FP32 network with its input, weight and output rounded to INT8."""

    convolution: Convolution
    read: Quantizer
    write: Quantizer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in, H, W) to (N, out, H', W'), FP32."""
        return self.write(self.convolution(self.read(x)))


def measure_costs(
    model: ResNet18,
    observed: GraphModule,
    settings: Settings,
    test: Cifar10,
    batch_size: int,
) -> list[LayerCost]:
    """Measure each layer's accuracy cost, alone in INT8 and alone in FP32.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated.
        settings: Of the quantization.
        test: Images to measure on.
        batch_size: In images.
    """
    dense_correct, only_quantized = scan_only_quantized(model, observed, test, batch_size)
    costs = []
    for layer, correct in cli.progress(only_quantized.items(), "diagnose: but one", unit="layer"):
        exempt = replace(settings, fp32_layers=(layer,))
        converted = engines.convert(engines.reuse_ranges(observed, model, exempt), exempt)
        others_correct = evaluate.predict(converted, test, batch_size, layer) == test.labels
        costs.append(
            LayerCost(
                layer,
                drop_only_quantized=evaluate.compare(dense_correct, correct).drop,
                drop_only_fp32=evaluate.compare(dense_correct, others_correct).drop,
            )
        )
    return costs


@torch.inference_mode()
def scan_only_quantized(
    model: ResNet18, observed: GraphModule, test: Cifar10, batch_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return per-image correctness (bool, (N,)): FP32's, and that with each layer alone in INT8.

    Each batch runs through the FP32 network once; every variant branches off where it differs.
    """
    network = FoldedNetwork.of(model)
    quantizers = engines.layer_quantizers(observed)
    convolutions = {
        name: QuantizedConvolution(
            replace(convolution, weight=engines.quantize_weight(convolution.weight)),
            *quantizers[name],
        )
        for name, convolution in network.convolutions().items()
    }
    rows = dict.fromkeys(convolutions, ALL_ROWS)
    read, write = quantizers["linear"]
    linear_weight = engines.quantize_weight(network.linear_weight)
    dense, alone = [], []
    for images, labels in cli.progress(batches(test, batch_size), "diagnose: alone"):
        trace = trace_dense(network, images)
        dense.append(network.classify(trace.features).argmax(dim=1) == labels)
        logits = branch_logits(network, trace, convolutions, rows)
        last = write(network.classify(read(trace.features), linear_weight))
        predictions = torch.cat([logits, last]).argmax(dim=1).view(-1, len(labels))
        alone.append(predictions == labels)
    by_layer = zip([*convolutions, "linear"], torch.cat(alone, dim=1), strict=True)
    return torch.cat(dense), dict(by_layer)
