"""How large a model is: bytes on disk, parameters, non-zeros, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from common.files.untrusted import serialize
from common.network.resnet import prunable_layers


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


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values: weights, biases, batch-norm scales and shifts."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_layers(model: nn.Module, image_size: int = 32) -> list[Layer]:
    """Describe every convolution and linear layer, in the order of the state dict.

    Args:
        model: Run once on a blank image of ``image_size`` × ``image_size`` to learn output sizes.
        image_size: In pixels.
    """
    output_positions = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            # Each weight is used once at every position of the output.
            output_positions[name] = output[0, 0].numel() if output.ndim == 4 else 1

        return hook

    layers = prunable_layers(model)
    hooks = [module.register_forward_hook(record(name)) for name, module in layers.items()]
    try:
        device = next(model.parameters()).device
        with torch.inference_mode():
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
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
