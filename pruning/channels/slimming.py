"""Slim networks: the dense one without some channels inside its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from common.network.branching import Block, Convolution, FoldedNetwork
from common.network.resnet import BLOCKS, ResNet18, Widths, batch_norm_after
from pruning.channels.surgeon import Kept

LARGEST_SCALE = 1e6


def flat_weight(convolution: Convolution) -> torch.Tensor:
    """Return a folded convolution's weight: (O, 9·C + 1), the bias last."""
    return torch.cat([convolution.weight.flatten(1), convolution.bias[:, None]], dim=1)


def with_flat_weight(convolution: Convolution, flat: torch.Tensor) -> Convolution:
    """Return a convolution with another weight, as :func:`flat_weight` gives it."""
    return _with(
        convolution, flat[:, :-1].unflatten(1, (-1, *convolution.weight.shape[2:])), flat[:, -1]
    )


def slim_block(block: Block, kept: Kept) -> Block:
    """Return a folded block with what is kept of its inside, in the block's precision."""
    return Block(
        _with(block.conv1, block.conv1.weight[kept.channels], block.conv1.bias[kept.channels]),
        with_flat_weight(block.conv2, kept.weight.to(block.conv1.weight.dtype)),
        block.shortcut,
    )


def _with(convolution: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> Convolution:
    weight = weight.contiguous(memory_format=torch.channels_last)
    return dataclasses.replace(convolution, weight=weight, bias=bias)


@torch.no_grad()
def slim_model(
    model: ResNet18, fitted: Mapping[str, tuple[Convolution, torch.Tensor, torch.Tensor]]
) -> ResNet18:
    """Return a network that computes what its fitted convolutions do, in eval mode.

    Its batch norms say what the new weights give, so that training can go on from there: a layer's
    weights are scaled to the size of the dense ones, which its batch norm takes back. That size may
    be zero, of the weights or through the batch norm; such a layer is not scaled.

    Args:
        model: Dense, in eval mode; not changed.
        fitted: For each convolution inside a block the folded one that takes its place, FP32, and
            mean and variance of that one's outputs, its bias aside.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = FoldedNetwork.of(model).convolutions()
    for conv, (new, mean, variance) in fitted.items():
        bn = batch_norm_after(conv)
        scale = _size_ratio(state[f"{conv}.weight"], folded[conv].weight)
        variance = variance * scale**2
        state[f"{conv}.weight"] = scale * new.weight
        state[f"{bn}.running_mean"] = scale * mean
        state[f"{bn}.running_var"] = variance
        state[f"{bn}.weight"] = (variance + model.get_submodule(bn).eps).sqrt() / scale
        state[f"{bn}.bias"] = new.bias + mean
    return _load(model, state)


def _size_ratio(weight: torch.Tensor, folded: torch.Tensor) -> float:
    """Return the ratio of two weights' norms, within what FP32 can square; 1 if one is zero."""
    norms = float(weight.norm()), float(folded.norm())
    return min(max(norms[0] / norms[1], 1 / LARGEST_SCALE), LARGEST_SCALE) if all(norms) else 1.0


@torch.no_grad()
def slim_by_norm(model: ResNet18, widths: Mapping[str, int]) -> ResNet18:
    """Return the network with the largest filters (L1) of each block's first convolution.

    Nothing makes up for the others: the control.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in BLOCKS:
        norms = state[f"{name}.conv1.weight"].abs().sum((1, 2, 3))
        channels = norms.topk(widths[name]).indices.sort().values
        for entry in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.bn1.{entry}"] = state[f"{name}.bn1.{entry}"][channels]
        state[f"{name}.conv1.weight"] = state[f"{name}.conv1.weight"][channels]
        state[f"{name}.conv2.weight"] = state[f"{name}.conv2.weight"][:, channels]
    return _load(model, state)


def _load(model: ResNet18, state: dict[str, torch.Tensor]) -> ResNet18:
    inner = tuple(len(state[f"{name}.conv1.weight"]) for name in BLOCKS)
    slim = ResNet18(Widths(model.widths.stages, inner), model.linear.out_features)
    slim.load_state_dict(state)
    return slim.to(state["conv1.weight"].device).eval()
