"""Slim networks: the dense one without some channels inside its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from common.network.branching import Block, Convolution, FoldedNetwork
from common.network.resnet import BLOCKS, ResNet18, Widths, prunable_layers
from pruning.channels.surgeon import Kept


def flat_weight(block: Block) -> torch.Tensor:
    """Return what reads a folded block's inside: (O, 9·C + 1), the bias last."""
    return torch.cat([block.conv2.weight.flatten(1), block.conv2.bias[:, None]], dim=1)


def slim_block(block: Block, kept: Kept) -> Block:
    """Return a folded block with what is kept of its inside, in the block's precision."""
    dtype = block.conv1.weight.dtype
    weight = kept.weight[:, :-1].unflatten(1, (-1, *block.conv2.weight.shape[2:]))
    return Block(
        _with(block.conv1, block.conv1.weight[kept.channels], block.conv1.bias[kept.channels]),
        _with(block.conv2, weight.to(dtype), kept.weight[:, -1].to(dtype)),
        block.shortcut,
    )


def _with(convolution: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> Convolution:
    weight = weight.contiguous(memory_format=torch.channels_last)
    return dataclasses.replace(convolution, weight=weight, bias=bias)


@torch.no_grad()
def slim_model(
    model: ResNet18,
    kept: Mapping[str, Kept],
    statistics: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> ResNet18:
    """Return a network that computes what ``slim_block`` of every block does, in eval mode.

    Its batch norms say what the new weights give, so that training can go on from there: a layer's
    weights are scaled to the size of the dense ones, which its batch norm takes back.

    Args:
        model: Dense, in eval mode; not changed.
        kept: Of every block, for folded batch norms.
        statistics: Mean and variance of what these weights give, without their biases.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = FoldedNetwork.of(model).blocks
    for name in BLOCKS:
        _narrow(state, name, kept[name].channels)
        new, eps = kept[name], model.get_submodule(f"{name}.bn2").eps
        dense, weight = folded[name].conv2.weight, new.weight[:, :-1]
        scale = float(state[f"{name}.conv2.weight"].norm() / dense.norm())
        mean, variance = statistics[name]
        variance = variance * scale**2
        state[f"{name}.conv2.weight"] = scale * weight.unflatten(1, (-1, *dense.shape[2:]))
        state[f"{name}.bn2.running_mean"] = mean * scale
        state[f"{name}.bn2.running_var"] = variance
        state[f"{name}.bn2.weight"] = (variance + eps).sqrt() / scale
        state[f"{name}.bn2.bias"] = new.weight[:, -1] + mean
    return _load(model, state)


@torch.no_grad()
def slim_by_norm(model: ResNet18, widths: Mapping[str, int]) -> ResNet18:
    """Return the network with the largest filters (L1) of each block's first convolution.

    Nothing makes up for the others: the control.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in BLOCKS:
        norms = state[f"{name}.conv1.weight"].abs().sum((1, 2, 3))
        channels = norms.topk(widths[name]).indices.sort().values
        _narrow(state, name, channels)
        state[f"{name}.conv2.weight"] = state[f"{name}.conv2.weight"][:, channels]
    return _load(model, state)


def _narrow(state: dict[str, torch.Tensor], block: str, channels: torch.Tensor) -> None:
    """Leave only ``channels`` of a block's first convolution and its batch norm."""
    for entry in ("weight", "bias", "running_mean", "running_var"):
        state[f"{block}.bn1.{entry}"] = state[f"{block}.bn1.{entry}"][channels]
    state[f"{block}.conv1.weight"] = state[f"{block}.conv1.weight"][channels]


def _load(model: ResNet18, state: dict[str, torch.Tensor]) -> ResNet18:
    inner = tuple(len(state[f"{name}.conv1.weight"]) for name in BLOCKS)
    slim = ResNet18(Widths(model.widths.stages, inner), model.linear.out_features)
    slim.load_state_dict(state)
    return slim.to(state["conv1.weight"].device).eval()


def inner_costs(model: ResNet18, costs: Mapping[str, int]) -> dict[str, int]:
    """Return, for each block, what one of its inner channels costs.

    Args:
        model: Dense.
        costs: Of each of its layers: multiply-adds, or weights.
    """
    layers = prunable_layers(model)
    return {
        name: (costs[f"{name}.conv1"] + costs[f"{name}.conv2"])
        // layers[f"{name}.conv1"].out_channels
        for name in BLOCKS
    }
