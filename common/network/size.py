"""How large a model is: bytes on disk, parameters, non-zeros, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from common.files.untrusted import serialize
from common.images.cifar10 import IMAGE_SIZE
from common.network.resnet import hooked, prunable_layers


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: As in the state dict, without ``.weight``.
        kind: ``conv`` or ``linear``.
        shape: Of its weight.
        weights: Number of weights; a bias is not counted.
        nonzeros: Weights that are not zero.
        macs: Multiply-accumulates an image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    nonzeros: int
    macs: int


def saved_size_bytes(state: Mapping[str, object]) -> int:
    """Return the bytes that ``torch.save`` of a state dict takes on disk."""
    return len(serialize(state))


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates that an image takes, weights of zero included."""
    return sum(layer.macs for layer in describe_layers(model))


def describe_layers(model: nn.Module) -> list[Layer]:
    """Describe every convolution and linear layer, in the order of the state dict.

    The model is run once on a blank image to learn output sizes.
    """
    layers, output_positions = prunable_layers(model), {}

    def record(name: str, layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        # Each weight is used once at every position of the output.
        output_positions[name] = output[0, 0].numel() if output.ndim == 4 else 1

    with hooked(layers, record), torch.inference_mode():
        device = next(model.parameters()).device
        model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
    return [
        Layer(
            name=name,
            kind="conv" if isinstance(module, nn.Conv2d) else "linear",
            shape=tuple(module.weight.shape),
            weights=module.weight.numel(),
            nonzeros=int(module.weight.count_nonzero()),
            macs=module.weight.numel() * output_positions[name],
        )
        for name, module in layers.items()
    ]
