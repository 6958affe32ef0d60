"""Slim networks: a network, or the module that it was traced from, without some channels."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from common.checkpoints.models import with_tensors
from common.network.execution import Layer, Network
from common.network.graph import AFFINE, RESHAPE, Graph
from common.network.tracing import Traced
from pruning.channels.groups import ChannelGroup
from pruning.channels.surgeon import ChannelChoice

Channels = Mapping[str, torch.Tensor]
Statistics = tuple[torch.Tensor, torch.Tensor]
LARGEST_SCALE = 1e6
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")


def channels_given(
    groups: Mapping[str, ChannelGroup], choices: Mapping[str, ChannelChoice]
) -> dict[str, torch.Tensor]:
    """Return for each operation that gives channels of a group which of them are kept."""
    return {
        name: choices[group.name].channels
        for group in groups.values()
        if group.name in choices
        for name in (*group.producers, *group.between)
    }


def slim_network(
    network: Network, groups: Mapping[str, ChannelGroup], choices: Mapping[str, ChannelChoice]
) -> Network:
    """Return the network, in its own precision, with only the channels chosen of some groups."""
    layers = dict(network.layers)
    for choice in choices.values():
        for name, layer in choice.layers.items():
            layers[name] = layer.to(network.layers[name].weight.dtype).laid_out()
    given = channels_given(groups, choices)
    for name, channels in given.items():
        if name in layers:
            layer = layers[name]
            layers[name] = Layer(layer.weight[channels], layer.bias[channels]).laid_out()
    operations = []
    for operation in network.graph.operations:
        if operation.name in given:
            width, attributes = len(given[operation.name]), dict(operation.attributes)
            if attributes.get("groups", 1) > 1:
                attributes["groups"] = width
            if operation.kind == RESHAPE:
                attributes["shape"] = [width, *attributes["shape"][1:]]
            operation = dataclasses.replace(operation, attributes=attributes)
        operations.append(operation)
    return Network(Graph(tuple(operations)), layers)


@torch.no_grad()
def slim_module(
    model: nn.Module, traced: Traced, network: Network, channels: Channels,
    statistics: Mapping[str, Statistics],
) -> nn.Module:  # fmt: skip
    """Return a copy of the dense module that computes what a slim network does.

    Batch norms get the statistics of the new weights, so that training can go on: a layer's weights
    are scaled to the size of the dense ones, and its batch norm takes the scale back.
    ``statistics`` are for each layer with new weights the mean and the variance of its outputs
    without its bias, each (O,).
    """
    state = model.state_dict()
    for name, kept in channels.items():
        if traced.network.graph[name].kind == AFFINE:
            entries = (f"{name}.{entry}" for entry in NORM_ENTRIES)
            state |= {entry: state[entry][kept] for entry in entries if entry in state}
    for name, (mean, variance) in statistics.items():
        layer, scale = network.layers[name], 1.0
        bias = layer.bias
        if (norm := traced.norms.get(name)) is not None:
            scale = _relative_size(state[f"{name}.weight"], traced.network.layers[name].weight)
            variance = variance * scale**2
            own = (variance + model.get_submodule(norm).eps).sqrt() / scale
            tensors = (own, bias + mean, scale * mean, variance)
            state |= {f"{norm}.{e}": x for e, x in zip(NORM_ENTRIES, tensors, strict=True)}
            bias = torch.zeros_like(bias) if f"{name}.bias" in state else None
        state[f"{name}.weight"] = (scale * layer.weight).contiguous()
        if bias is not None:
            state[f"{name}.bias"] = bias
    return with_tensors(model, state)


def _relative_size(weight: torch.Tensor, folded: torch.Tensor) -> float:
    """Return the size of a layer's own weights over that of folded ones, within FP32's range."""
    sizes = float(weight.norm()), float(folded.norm())
    return min(max(sizes[0] / sizes[1], 1 / LARGEST_SCALE), LARGEST_SCALE) if all(sizes) else 1.0
