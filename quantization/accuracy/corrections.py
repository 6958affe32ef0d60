"""Corrections of FP32 weights before quantization; none of them costs anything at run time.

Each returns a network that computes the same function in FP32 (equalisation) or nearly so (bias
correction), and loses less of it in INT8.
"""

import torch

from common.images.data import ImageSet
from common.network import graph as kinds
from common.network.execution import Layer, Network
from common.network.graph import Operation, evaluate
from quantization.int8.conversion import quantize_layer

# What a positive factor of a channel passes through: f(s·x) = s·f(x).
HOMOGENEOUS = ("relu", *kinds.POOLS, kinds.FLATTEN)
MAX_SWEEPS = 20
EQUAL = 0.01  # logarithm of a factor below which a chain of layers counts as equalised


@torch.no_grad()
def equalize_cross_layer(network: Network) -> Network:
    """Return a network in which the channels between two layers have like ranges in both.

    A channel between them can be scaled by any s > 0, for ReLU(s·x) = s·ReLU(x): the first layer
    gives s times as much, the second takes 1/s of it. The s that makes the ranges of the channel's
    weights equal leaves no channel that dwarfs the others (Nagel et al., 2019,
    https://arxiv.org/abs/1906.04721, equation 11). Chains of more layers are swept until nothing
    changes.
    """
    layers = {name: network.layers[name] for name in network.graph.layers}
    pairs = equalizable_pairs(network)
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for first, second in pairs:
            groups = network.graph[second].attributes.get("groups", 1)
            layers[first], layers[second], scale = _equalize(layers[first], layers[second], groups)
            largest = max(largest, float(scale.log().abs().max()))
        if largest < EQUAL:
            break
    return network.with_layers(layers)


def equalizable_pairs(network: Network) -> list[tuple[str, str]]:
    """Return in order the pairs of layers with nothing but homogeneous operations between them."""
    graph, pairs = network.graph, []
    for name in graph.layers:
        reader = graph.sole_user(name)
        while reader is not None and reader.kind in HOMOGENEOUS:
            reader = graph.sole_user(reader.name)
        if reader is not None and reader.is_layer:
            pairs.append((name, reader.name))
    return pairs


@torch.no_grad()
def correct_biases(network: Network, calibration: ImageSet, batch_size: int) -> Network:
    """Return a network whose biases cancel the mean error that rounding the weights will make.

    The mean is taken over images and positions, channel by channel: E[conv(x, w) - conv(x, ŵ)]
    (Nagel et al., 2019, section 4.2, measured on calibration images instead of derived).
    """
    graph = network.graph
    layers = {name: network.layers[name] for name in graph.layers}
    totals = {name: torch.zeros_like(layer.bias) for name, layer in layers.items()}

    def rounding(layer: Layer) -> Layer:
        weight = layer.weight - quantize_layer(layer).dense().weight
        return Layer(weight, torch.zeros_like(layer.bias))

    errors = {name: rounding(layer) for name, layer in layers.items()}

    def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
        if operation.is_layer:
            error = network.compute(operation, inputs, layer=errors[operation.name])
            positions = error.unsqueeze(2).flatten(2)  # (N, O, positions); a linear layer has one
            totals[operation.name] += positions.mean(2).sum(0)
        return network.compute(operation, inputs, operation.name in network.overwriting)

    for images, _ in calibration.batches(batch_size):
        evaluate(graph, compute, {graph.input: images}, [graph.output])
    return network.with_layers(
        {
            name: Layer(layer.weight, layer.bias + totals[name] / len(calibration))
            for name, layer in layers.items()
        }
    )


def _equalize(first: Layer, second: Layer, groups: int) -> tuple[Layer, Layer, torch.Tensor]:
    """Return both layers rescaled, and the factor of each channel; 1 for one without weights."""
    ranges1 = first.weight.abs().flatten(1).amax(dim=1)
    # As (groups, outputs and channels of a group, positions of each channel).
    shape = (groups, len(second.weight) // groups, len(ranges1) // groups, -1)
    by_input = second.weight.reshape(shape)
    ranges2 = by_input.abs().amax(dim=(1, 3)).flatten()
    scale = torch.where((ranges1 > 0) & (ranges2 > 0), (ranges2 / ranges1).sqrt(), 1.0)
    outputs = scale.view(-1, *[1] * (first.weight.ndim - 1))
    by_input = by_input / scale.view(groups, 1, -1, 1)
    return (
        Layer(first.weight * outputs, first.bias * scale),
        Layer(by_input.reshape(second.weight.shape), second.bias),
        scale,
    )
