"""Ridge regression for a layer, on samples of what it reads and of what it should give.

The coder and the removal of channels both ask which weights bring a layer closest to wanted
outputs, given the inputs that it now gets. A grouped convolution is one regression for each group:
moments have a dimension of groups.

A ReLU maps all negative outputs to zero, so only errors that it lets through count (Zhang et al.,
2015, arXiv:1411.4229). Where a negative output is wanted, any negative output is as good. There the
target becomes what the regression gave, or zero where that was positive, and the regression is
repeated. Each repetition lowers the error after the ReLU.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from common.fitting.sampling import Samples, grouped, outputs_of
from common.network.execution import Layer

MAX_COLUMNS = 10_000  # a regression of more inputs would take gigabytes
ROUNDING = 1e-6  # variance that rounding gives constant outputs, relative to their square
SMALLEST_SPREAD = 1e-12  # mean square of inputs that are always zero, so that no matrix is singular
RELAXATIONS = 2  # how often a regression before an activation is repeated


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
        by_group = grouped(weight, len(self.mean))
        variance = ((by_group @ self.covariance) * by_group).sum(2).flatten()
        return self._read_mean(weight), variance.clamp_min(0)

    def _read_mean(self, weight: torch.Tensor) -> torch.Tensor:
        return (grouped(weight, len(self.mean)) @ self.mean[:, :, None]).flatten()


def measure_moments(
    layer: Layer, groups: int, draw: Callable[[], Iterable[Samples]],
    ridge: Callable[[Moments], torch.Tensor], active: tuple[float, float] | None,
) -> Moments:  # fmt: skip
    """Return a layer's moments, towards outputs that are relaxed if an activation follows.

    ``draw`` yields the samples, the same each time; ``ridge`` returns the ridge (groups,) for
    moments; ``active`` is the range of :func:`common.fitting.sampling.active_range`.
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
        weight = grouped(layer.weight, groups)
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
