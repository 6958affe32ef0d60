"""Ridge regression for a layer, on what it reads at sampled positions.

The coder and the removal of channels both ask which weights bring a layer closest to wanted
outputs, given the inputs that it now gets. Outputs are sampled at a few random positions of each
image. A grouped convolution is one regression for each group: moments have a dimension of groups.

Before a ReLU all negative outputs are alike, so only an error that changes what the ReLU gives
counts (Zhang et al., 2015, arXiv:1411.4229). Where an output is wanted that is negative, any
negative one will do: the regression is repeated with the output of the last one as the target
there, or zero where that was positive. Each repetition lowers the error after the ReLU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.network.execution import Layer, Network
from common.network.graph import ADD, LINEAR, Operation

MAX_COLUMNS = 10_000  # a regression of more inputs would take gigabytes
ROUNDING = 1e-6  # variance that rounding gives constant outputs, relative to their square
SMALLEST_SPREAD = 1e-12  # mean square of inputs that are always zero, so that no matrix is singular
RELAXATIONS = 2  # how often a regression before an activation is repeated
# Outside of these ranges an activation gives one and the same value.
ACTIVE_RANGES = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
}


def draw_positions(
    value: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Draw up to ``count`` positions of each image's outputs (N, O, H, W) or (N, O).

    Returns:
        int64, (N, P), each ``row * W + column``; None for a linear layer's outputs.
    """
    if value.ndim == 2:
        return None
    total = value.shape[2] * value.shape[3]
    keys = torch.rand(len(value), total, generator=generator)
    return keys.topk(min(count, total), dim=1).indices.to(value.device)


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

    Returns:
        float32, (rows, groups, columns), the columns in the order of ``weight.flatten(1)``.
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


def completed_sum(network: Network, layer: str) -> tuple[str, str] | None:
    """Return the addition that a layer completes, and the addition's other operand.

    None if another operation reads the layer's outputs too, or the other operand is computed later.
    """
    user = network.graph.sole_user(layer)
    if user is None or user.kind != ADD or len(set(user.inputs)) != 2:
        return None
    other = next(name for name in user.inputs if name != layer)
    first = next(o.name for o in network.graph.operations if o.name in user.inputs)
    if first == layer or network.shapes[other] != network.shapes[layer]:
        return None
    return user.name, other


def active_range(network: Network, layer: str) -> tuple[float, float] | None:
    """Return the range of ``ACTIVE_RANGES`` in which a layer's outputs count.

    They are those of the sum that it completes, if it does. None if they count everywhere, as they
    do if another operation reads them too.
    """
    completed = completed_sum(network, layer)
    user = network.graph.sole_user(layer if completed is None else completed[0])
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


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's inputs and of its residuals: wanted outputs minus given ones."""

    mean: torch.Tensor  # mean of the inputs, (groups, columns)
    covariance: torch.Tensor  # covariance of the inputs, (groups, columns, columns)
    lacking: torch.Tensor  # mean of the residuals, (O,)
    cross: torch.Tensor  # covariance of residuals and inputs, (groups, O / groups, columns)
    variance: float  # variance of what is wanted, summed over the outputs

    @property
    def squares(self) -> torch.Tensor:
        """Mean square of each group's inputs, (groups,)."""
        diagonal = self.covariance.diagonal(dim1=1, dim2=2)
        return (diagonal + self.mean.square()).mean(1).clamp_min(SMALLEST_SPREAD)

    def refit(self, layer: Layer, ridge: torch.Tensor) -> Layer:
        """Return the layer fitted to the wanted outputs by ridge regression.

        ``ridge`` (groups,) is the penalty on the squared change of a weight.
        """
        factor = torch.linalg.cholesky(with_ridge(self.covariance, ridge))
        change = torch.cholesky_solve(self.cross.transpose(1, 2), factor).transpose(1, 2)
        weight = layer.weight + change.reshape(layer.weight.shape)
        return Layer(weight, self.best_bias(layer, weight))

    def best_bias(self, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        """Return the bias with which another weight gives the wanted outputs' mean."""
        return layer.bias + self.lacking + self._read_mean(layer.weight - weight)

    def output_statistics(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of each output that a weight gives without a bias, (O,)."""
        grouped = _grouped(weight, len(self.mean))
        variance = ((grouped @ self.covariance) * grouped).sum(2).flatten()
        return self._read_mean(weight), variance.clamp_min(0)

    def _read_mean(self, weight: torch.Tensor) -> torch.Tensor:
        return (_grouped(weight, len(self.mean)) @ self.mean[:, :, None]).flatten()


def measure_moments(
    layer: Layer,
    groups: int,
    draw: Callable[[], Iterable[Samples]],
    ridge: Callable[[Moments], torch.Tensor],
    active: tuple[float, float] | None,
) -> Moments:
    """Return a layer's moments, towards outputs that are relaxed if an activation follows.

    Args:
        layer: Layer to be fitted.
        groups: Number of its groups.
        draw: Yields the samples; they are the same each time.
        ridge: Returns the ridge (groups,) of a regression on moments.
        active: Range of outputs that count, as :func:`active_range` returns it.
    """
    sums = MomentSums(layer, groups)
    for samples in draw():
        sums.add(samples.rows, samples.wanted)
    moments = sums.moments()
    for _ in range(0 if active is None else RELAXATIONS):
        fitted = moments.refit(layer, ridge(moments))
        sums = MomentSums(layer, groups, moments)
        for samples in draw():
            sums.add(samples.rows, samples.relaxed(fitted, active).wanted)
        moments = sums.moments()
    return moments


class MomentSums:
    """Sums over the samples of an FP32 layer, from which its moments follow.

    Where ``known`` are moments of the same inputs, only what depends on the residuals is summed.
    """

    def __init__(self, layer: Layer, groups: int, known: Moments | None = None):
        self._layer, self._groups, self._known, self._count = layer, groups, known, 0
        weight = _grouped(layer.weight, groups)
        columns, new = weight.shape[2], layer.weight.new_zeros
        self._inner = new(groups, columns, columns) if known is None else None
        self._cross = new(weight.shape)
        self._rows = new(groups, columns)
        self._lacking, self._wanted, self._square = (new(len(layer.bias)) for _ in range(3))

    def add(self, rows: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Add inputs (n, groups, columns) and wanted outputs (n, O); None for those given."""
        rows = rows.transpose(0, 1)
        if self._known is None:
            self._inner.baddbmm_(rows.transpose(1, 2), rows)
        self._rows += rows.sum(1)
        self._count += rows.shape[1]
        if wanted is None:
            return
        given = outputs_of(rows.transpose(0, 1), self._layer.weight)
        lacking = wanted - given.add_(self._layer.bias)
        by_group = lacking.unflatten(1, (self._groups, -1)).permute(1, 2, 0)
        self._cross.baddbmm_(by_group, rows)
        self._lacking += lacking.sum(0)
        self._wanted += wanted.sum(0)
        self._square += wanted.square().sum(0)

    def moments(self) -> Moments:
        """Return the moments; the sums are used up."""
        count = self._count
        mean, lacking, wanted = self._rows / count, self._lacking / count, self._wanted / count
        cross = self._cross.div_(count)
        cross -= lacking.view(self._groups, -1, 1) * mean[:, None]
        if self._known is not None:
            return replace(self._known, lacking=lacking, cross=cross)
        covariance = self._inner.div_(count).sub_(mean[:, :, None] * mean[:, None])
        square = wanted.square()
        variance = (self._square / count - square).maximum(ROUNDING * square).sum()
        return Moments(mean, covariance, lacking, cross, float(variance))


def with_ridge(covariance: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Return covariances (groups, columns, columns) with a ridge (groups,) on their diagonals."""
    damped = covariance.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return damped


def outputs_of(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the outputs (n, O) that a weight gives for inputs (n, groups, columns)."""
    by_group = rows.transpose(0, 1) @ _grouped(weight, rows.shape[1]).transpose(1, 2)
    return by_group.transpose(0, 1).flatten(1)


def _grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    return weight.flatten(1).unflatten(0, (groups, -1))
