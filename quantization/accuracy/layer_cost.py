"""The accuracy that each layer's quantization costs: with it alone in INT8, with it alone in FP32.

Both are measured without running whole networks for each layer. Alone in INT8, a layer's variant
branches off the FP32 network, as in the pruning scan. Alone in FP32, it shares all that lies before
it with the INT8 network, on whose real kernels what follows runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from common.command import cli
from common.images.data import ImageSet, batches
from common.machine.device import bf16_pays
from common.network.branching import start_values
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.execution import Network
from common.network.resnet import ResNet18, fold_batch_norm, prunable_layers
from common.network.tracing import trace_network
from quantization.accuracy.quantizers import Quantizer, layer_quantizers, quantize_weight
from quantization.int8 import conversion, engines
from quantization.settings import Settings

BRANCH_BATCH = 16  # images; the branches of more no longer fit a CPU's L3 cache


@torch.inference_mode()
def scan_only_quantized(
    model: ResNet18, observed: GraphModule, test: ImageSet, record: Fp32Recheck
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return per-image correctness (bool, (N,)): FP32's, and that with each layer alone in INT8.

    Branches run in bf16 first, where the CPU is made for it.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated, which knows the activations' ranges.
        test: Images to measure on.
        record: Of what FP32 decided again after bf16; counted into.
    """
    fast = bf16_pays()
    cascade = Cascade.of(trace_network(model, test.shape), fast)
    network, quantizers = cascade.network, layer_quantizers(observed)
    graph, layers = network.graph, list(prunable_layers(model))
    int8 = network.with_layers(
        {
            n: replace(network.layers[n], weight=quantize_weight(network.layers[n].weight))
            for n in layers
        }
    )
    exact = {name: _quantized(int8, name, *quantizers[name]) for name in layers}
    int8_fast = int8.to(torch.bfloat16)
    rounded = {name: _quantized(int8_fast, name, *quantizers[name]) for name in layers}
    variants = Variants(exact, rounded if fast else None)
    bounds = cascade.measure_bounds(test, variants, BRANCH_BATCH) if fast else None
    wanted = [*start_values(graph, layers), graph.output]
    dense, alone = [], []
    count = math.ceil(len(test) / BRANCH_BATCH)
    for images, labels in cli.progress(batches(test, BRANCH_BATCH), "diagnose: INT8", count):
        values = network.run({graph.input: images}, wanted)
        dense.append(values[graph.output].argmax(dim=1) == labels)
        alone.append(cascade.predict(values, variants, bounds, record) == labels)
    by_layer = zip(layers, torch.cat(alone, dim=1), strict=True)
    return torch.cat(dense), dict(by_layer)


@torch.inference_mode()
def scan_only_fp32(
    model: ResNet18, observed: GraphModule, settings: Settings, test: ImageSet, batch_size: int
) -> dict[str, torch.Tensor]:
    """Return per-image correctness (bool, (N,)) of INT8 with each layer alone in FP32.

    Args:
        model: FP32, in eval mode.
        observed: The same model calibrated.
        settings: Of the quantization, with no layer in FP32.
        test: Images to measure on.
        batch_size: In images.
    """
    folded = prunable_layers(fold_batch_norm(model).to(memory_format=torch.channels_last))
    correct = {layer: [] for layer in folded}
    with engines.quiet_torch(settings.engine):
        converted = conversion.convert(observed, settings)
        network, rest = Interpreter(converted, garbage_collect_values=False), Interpreter(converted)
        count = math.ceil(len(test) / batch_size)
        for images, labels in cli.progress(batches(test, batch_size), "diagnose: FP32", count):
            network.run(images)
            for name, logits in logits_by_layer(network.env, rest, folded).items():
                correct[name].append(logits.argmax(dim=1) == labels)
    return {name: torch.cat(parts) for name, parts in correct.items()}


def logits_by_layer(
    values: Mapping[Node, torch.Tensor], rest: Interpreter, folded: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Return the logits (N, classes) with each layer alone in FP32.

    Args:
        values: Of the INT8 model's nodes, on a batch.
        rest: Of that model: computes anew what follows a layer.
        folded: The layers in FP32.
    """
    before, logits = {}, {}
    for node, value in values.items():
        if (name := node.target) in folded:
            int8 = rest.module.get_submodule(name)
            changed = _run_in_fp32(folded[name], int8, before[node.args[0]])
            logits[name] = rest.run(initial_env=before | {node: changed})
        before[node] = value
    return logits


def _quantized(
    int8: Network, name: str, read: Quantizer, write: Quantizer
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a layer, its weight rounded, that rounds its input and output.

    Rounding happens in FP32, whatever the layer runs in.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        y = int8.compute(int8.graph[name], [read(x.float())])
        return write(y.float()).to(y.dtype)

    return run


def _run_in_fp32(layer: nn.Conv2d | nn.Linear, int8: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Map what the INT8 form of a layer maps; the last layer's logits are left unrounded."""
    y = layer(x.dequantize())
    if isinstance(layer, nn.Linear):
        return y
    y = y.relu_() if int8._get_name() == "QuantizedConvReLU2d" else y
    return torch.quantize_per_tensor(y, int8.scale, int8.zero_point, torch.quint8)
