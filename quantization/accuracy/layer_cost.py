"""The accuracy that each layer's quantization costs: with it alone in INT8, with it alone in FP32.

Both are measured without running whole networks for each layer. Alone in INT8, a layer's variant
branches off the FP32 network, as in the pruning scan. Alone in FP32, it shares all that lies before
its residual block with the INT8 network, whose real kernels it runs on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from common.command import cli
from common.images.data import Cifar10, batches
from common.machine.device import bf16_pays
from common.network.branching import Convolution, trace_dense
from common.network.cascade import Branches, Cascade, Recomputation
from common.network.resnet import ResNet18, fold_batch_norm, prunable_layers
from quantization.accuracy.quantizers import Quantizer, layer_quantizers, quantize_weight
from quantization.int8 import conversion, engines
from quantization.settings import Settings

BRANCH_BATCH = 16  # images; the branches of more no longer fit a CPU's L3 cache
ADDITIONS = (torch.ops.quantized.add, torch.ops.quantized.add_relu)


@dataclass(frozen=True)
class QuantizedConvolution:
    """A convolution with its input, its weight and its output rounded to INT8.

    The weight is rounded already. Rounding happens in FP32, whatever the convolution runs in.
    """

    convolution: Convolution
    read: Quantizer
    write: Quantizer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in, H, W) to (N, out, H', W'), in the dtype of ``x``."""
        y = self.convolution(self.read(x.float()).to(x.dtype))
        return self.write(y.float()).to(x.dtype)


class Fp32Layer(nn.Module):
    """A layer of the folded FP32 network in the place of its INT8 form in a converted model."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, int8: nn.Module):
        super().__init__()
        self.layer = layer
        self.scale, self.zero_point = float(int8.scale), int(int8.zero_point)
        self.has_relu = int8._get_name() == "QuantizedConvReLU2d"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map what the INT8 layer maps; the last layer's logits are left unrounded."""
        y = self.layer(x.dequantize())
        if isinstance(self.layer, nn.Linear):
            return y
        y = y.relu_() if self.has_relu else y
        return torch.quantize_per_tensor(y, self.scale, self.zero_point, torch.quint8)


@torch.inference_mode()
def scan_only_quantized(
    model: ResNet18, observed: GraphModule, test: Cifar10, record: Recomputation
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
    cascade, quantizers = Cascade.of(model, fast), layer_quantizers(observed)
    network = cascade.network
    exact = {
        name: QuantizedConvolution(
            replace(convolution, weight=quantize_weight(convolution.weight)),
            *quantizers[name],
        )
        for name, convolution in network.convolutions().items()
    }
    rounded = {
        name: replace(part, convolution=part.convolution.to(torch.bfloat16))
        for name, part in exact.items()
    }
    branches = Branches(exact, rounded if fast else None)
    bounds = cascade.measure_bounds(test, branches, BRANCH_BATCH) if fast else None
    read, write = quantizers["linear"]
    linear_weight = quantize_weight(network.linear_weight)
    dense, alone = [], []
    count = math.ceil(len(test) / BRANCH_BATCH)
    for images, labels in cli.progress(batches(test, BRANCH_BATCH), "diagnose: INT8", count):
        trace = trace_dense(network, images)
        dense.append(network.classify(trace.features).argmax(dim=1) == labels)
        classes = cascade.predict(trace, branches, bounds, record)
        last = write(network.classify(read(trace.features), linear_weight)).argmax(dim=1)
        alone.append(torch.cat([classes, last[None]]) == labels)
    by_layer = zip([*exact, "linear"], torch.cat(alone, dim=1), strict=True)
    return torch.cat(dense), dict(by_layer)


@torch.inference_mode()
def scan_only_fp32(
    model: ResNet18, observed: GraphModule, settings: Settings, test: Cifar10, batch_size: int
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
        network = with_boundaries(converted)
        tails = {}
        for name, layer in folded.items():
            tails[name] = tail_from(converted, boundary_before(name))
            tails[name].set_submodule(name, Fp32Layer(layer, converted.get_submodule(name)))
        count = math.ceil(len(test) / batch_size)
        for images, labels in cli.progress(batches(test, batch_size), "diagnose: FP32", count):
            values = [images, *network(images)]
            for name, tail in tails.items():
                logits = tail(values[boundary_before(name)])
                correct[name].append(logits.argmax(dim=1) == labels)
    return {name: torch.cat(parts) for name, parts in correct.items()}


def boundary_before(layer: str) -> int:
    """Return the last boundary before a layer: 0 the images, 1 the stem, then one a block."""
    stage, _, rest = layer.partition(".")
    if not stage.startswith("layer"):
        return {"conv1": 0, "linear": -1}[layer]
    return 1 + 2 * (int(stage.removeprefix("layer")) - 1) + int(rest[0])


def _boundaries(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes between which the blocks of a converted model lie, the images first."""
    stem = [node for node in nodes if node.op == "placeholder" or node.target == "conv1"]
    return [*stem, *(node for node in nodes if node.target in ADDITIONS)]


def with_boundaries(converted: GraphModule) -> GraphModule:
    """Return the model with the values at its boundaries, from the stem's on, as its output."""
    graph, _ = _copy(converted)
    graph.output(tuple(_boundaries(list(graph.nodes))[1:]))
    return GraphModule(converted, graph)


def tail_from(converted: GraphModule, boundary: int) -> GraphModule:
    """Return what a converted model does after one of its boundaries, given the value there."""
    graph, logits = _copy(converted)
    graph.output(logits)
    tail = GraphModule(converted, graph)
    images, *_ = nodes = _boundaries(list(graph.nodes))
    if nodes[boundary] is not images:
        with graph.inserting_before(images):
            nodes[boundary].replace_all_uses_with(graph.placeholder("boundary"))
        graph.eliminate_dead_code()
        graph.erase_node(images)
        tail.recompile()
    return tail


def _copy(converted: GraphModule) -> tuple[Graph, Node]:
    """Return a copy of a model's graph that has no output yet, and what it would put out."""
    graph = Graph()
    return graph, graph.graph_copy(converted.graph, {})
