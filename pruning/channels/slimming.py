"""Slim networks: a network, or the module that it was traced from, without some channels."""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from common.network.execution import Layer, Network
from common.network.graph import AFFINE, RESHAPE, Graph
from common.network.tracing import Traced
from pruning.channels.groups import ChannelGroup
from pruning.channels.surgeon import ChannelChoice

Channels = Mapping[str, torch.Tensor]
Statistics = tuple[torch.Tensor, torch.Tensor]
LARGEST_SCALE = 1e6


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
    network: Network,
    groups: Mapping[str, ChannelGroup],
    choices: Mapping[str, ChannelChoice],
) -> Network:
    """Return the network without the channels that were not chosen, in its own precision.

    Args:
        network: Dense.
        groups: Groups of channels by name.
        choices: Kept channels of some of the groups, and the layers that read them.
    """
    layers = dict(network.layers)
    for choice in choices.values():
        for name, layer in choice.layers.items():
            layers[name] = _laid_out(layer.to(network.layers[name].weight.dtype))
    given = channels_given(groups, choices)
    for name, channels in given.items():
        if name in layers:
            layers[name] = _laid_out(
                Layer(layers[name].weight[channels], layers[name].bias[channels])
            )
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
    model: nn.Module,
    traced: Traced,
    network: Network,
    channels: Channels,
    statistics: Mapping[str, Statistics],
) -> nn.Module:
    """Return a copy of the dense module that computes what a slim network does.

    Batch norms get the statistics of the new weights, so that training can go on: a layer's weights
    are scaled to the size of the dense ones, and its batch norm takes the scale back.

    Args:
        model: Dense, in eval mode; not changed.
        traced: Its network, and which batch norms were folded into it.
        network: Slim, FP32.
        channels: Kept channels of the operations that have fewer of them.
        statistics: For each layer with other weights than the dense one: mean and variance of its
            outputs without its bias, each (O,).
    """
    slim = copy.deepcopy(model)
    for name, kept in channels.items():
        if traced.network.graph[name].kind == AFFINE:
            _narrow_norm(slim.get_submodule(name), kept)
    for name in statistics:
        layer, module = network.layers[name], slim.get_submodule(name)
        scale = 1.0
        if name in traced.norms:
            norm = slim.get_submodule(traced.norms[name])
            if name in channels:
                _narrow_norm(norm, channels[name])
            scale = _relative_size(module.weight, traced.network.layers[name].weight)
            _set_norm(norm, layer.bias, *statistics[name], scale)
        _set_weight(module, scale * layer.weight, None if name in traced.norms else layer.bias)
        if network.graph[name].attributes.get("groups", 1) > 1:
            module.groups = network.graph[name].attributes["groups"]
            module.in_channels = module.groups
    return slim


def _relative_size(weight: torch.Tensor, folded: torch.Tensor) -> float:
    """Return how much larger a layer's own weights are than the folded ones; 1 for zeros.

    The ratio stays within what FP32 can square.
    """
    sizes = float(weight.norm()), float(folded.norm())
    return min(max(sizes[0] / sizes[1], 1 / LARGEST_SCALE), LARGEST_SCALE) if all(sizes) else 1.0


def _set_norm(
    norm: nn.Module, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, scale: float
) -> None:
    """Have a batch norm give what the weights do that are ``scale`` times too large."""
    variance = variance * scale**2
    norm.running_mean, norm.running_var = scale * mean, variance
    norm.weight = nn.Parameter((variance + norm.eps).sqrt() / scale)
    norm.bias = nn.Parameter(bias + mean)


def _set_weight(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace a layer's weight and bias; a bias that a batch norm holds becomes zero."""
    module.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias)
    elif module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(len(weight), device=weight.device))
    outputs, inputs = weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = outputs, inputs
    else:
        module.out_channels, module.in_channels = outputs, inputs


def _narrow_norm(norm: nn.Module, channels: torch.Tensor) -> None:
    norm.num_features = len(channels)
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[channels])
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, nn.Parameter(getattr(norm, name)[channels]))


def _laid_out(layer: Layer) -> Layer:
    if layer.weight.ndim == 4:
        return Layer(layer.weight.contiguous(memory_format=torch.channels_last), layer.bias)
    return layer
