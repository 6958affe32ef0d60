"""What a layer reads and should give, at a few random positions of each image's outputs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.network.execution import Layer, Network
from common.network.graph import ADD, LINEAR, Operation

# Outside of these ranges an activation gives one and the same value.
ACTIVE_RANGES = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
}


def draw_positions(
    shape: Sequence[int], count: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Draw up to ``count`` positions of each image's outputs, of ``shape`` (N, O, H, W).

    They are int64, (N, P), on the CPU, each ``row * W + column``; None for a linear layer's outputs
    (N, O).
    """
    if len(shape) == 2:
        return None
    total = shape[2] * shape[3]
    keys = torch.rand(shape[0], total, generator=generator)
    return keys.topk(min(count, total), dim=1).indices


def outputs_at(value: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return outputs (N, O, H, W) at positions (N, P), or all of (N, O): float32, (rows, O)."""
    if positions is None:
        return value.float()
    index = positions[:, None].expand(-1, value.shape[1], -1)
    return value.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1).float()


def inputs_at(
    operation: Operation, layer: Layer, x: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    """Return the part of a layer's input ``x`` that its outputs at some positions depend on.

    It is float32, (rows, groups, columns), the columns in the order of ``weight.flatten(1)``.
    """
    if operation.kind == LINEAR:
        return x.float()[:, None]
    settings = operation.attributes
    kernel, groups = layer.weight.shape[2:], settings["groups"]
    (top, left), stride, dilation = settings["padding"], settings["stride"], settings["dilation"]
    width = (x.shape[3] + 2 * left - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    steps = [torch.arange(k, device=x.device) * d for k, d in zip(kernel, dilation, strict=True)]
    rows = stride[0] * (positions // width)[:, :, None, None] + steps[0][:, None]
    columns = stride[1] * (positions % width)[:, :, None, None] + steps[1]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    padded = F.pad(x, (left, left, top, top)).permute(0, 2, 3, 1)
    found = padded[image, rows, columns].permute(0, 1, 4, 2, 3)  # (N, P, I, height, width)
    return found.flatten(0, 1).unflatten(1, (groups, -1)).flatten(2).float()


def completed_sum(network: Network, layer: str) -> tuple[str, str | None]:
    """Return the addition that a layer completes and its other operand; else the layer and None.

    It completes none if another operation reads its outputs or the other operand is computed later.
    """
    user = network.graph.sole_user(layer)
    if user is None or user.kind != ADD or len(set(user.inputs)) != 2:
        return layer, None
    other = next(name for name in user.inputs if name != layer)
    first = next(o.name for o in network.graph.operations if o.name in user.inputs)
    if first == layer or network.shapes[other] != network.shapes[layer]:
        return layer, None
    return user.name, other


def active_range(network: Network, layer: str) -> tuple[float, float] | None:
    """Return the range of ``ACTIVE_RANGES`` in which a layer's outputs count.

    They are those of the sum that it completes, if it does. None if they count everywhere, as they
    do if another operation reads them too.
    """
    user = network.graph.sole_user(completed_sum(network, layer)[0])
    return None if user is None else ACTIVE_RANGES.get(user.kind)


class Samples(NamedTuple):
    """A layer at some positions of some images."""

    rows: torch.Tensor  # what it reads, (n, groups, columns)
    wanted: torch.Tensor  # what it should give, (n, O)
    added: torch.Tensor | float = 0.0  # what is added to its outputs, (n, O)

    def relaxed(self, fitted: Layer, active: tuple[float, float]) -> "Samples":
        """Return samples that want no more than what counts after an activation.

        ``fitted`` is the layer that was fitted to these ones, ``active`` the range that counts.
        """
        given = outputs_of(self.rows, fitted.weight) + fitted.bias + self.added
        wanted, (low, high) = self.wanted + self.added, active
        relaxed = torch.where(wanted <= low, given.clamp(max=low), wanted)
        relaxed = torch.where(wanted >= high, given.clamp(min=high), relaxed)
        return self._replace(wanted=relaxed - self.added)


def outputs_of(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the outputs (n, O) that a weight gives for inputs (n, groups, columns)."""
    by_group = rows.transpose(0, 1) @ grouped(weight, rows.shape[1]).transpose(1, 2)
    return by_group.transpose(0, 1).flatten(1)


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return a weight as (groups, outputs of a group, columns)."""
    return weight.flatten(1).unflatten(0, (groups, -1))
