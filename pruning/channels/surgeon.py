"""Which channels can go, and what the weights that read the others become: optimal brain surgeon.

A layer's outputs are linear in its inputs, so over many samples the squared change of the outputs
is quadratic in the weights, with H the covariance of the inputs (the bias makes up for the mean).
The best weights without some channels have a closed form, and so has what they cost. The cheapest
channels go first, a few at a time, and H⁻¹ follows (Hassibi and Stork, 1992; for whole structures
ZipLM: Kurtic et al., 2023, https://arxiv.org/abs/2302.04089). Where several layers read a channel,
its cost is the sum over them, each layer's as a share of the variance of its outputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from common.fitting.regression import SMALLEST_SPREAD, Moments, with_ridge
from common.network.execution import Layer

# Ridge as a share of the mean square of the inputs: few images leave some directions unknown.
DAMPING = 0.01
GROUP = 32  # each step removes one channel in so many: what is cheap together changes slowly


@dataclass(frozen=True)
class ChannelChoice:
    """Some channels of a group, and the layers that make the best of them."""

    channels: torch.Tensor  # indices of the channels that are kept, sorted
    layers: Mapping[str, Layer]  # weights of each layer that reads them, for these channels alone


@dataclass
class Reader:
    """A layer that reads the channels, while they are removed."""

    layer: Layer  # the layer, with all channels
    moments: Moments  # moments of its inputs
    window: int  # number of its columns that are one channel
    weight: torch.Tensor  # weights of the channels that are left, (O, columns)
    inverse: torch.Tensor  # inverse of their damped covariance
    scale: float  # what a squared error of its outputs counts

    @classmethod
    def start(cls, layer: Layer, moments: Moments, channels: int) -> "Reader":
        """Return a reader of all ``channels``."""
        weight = layer.weight.flatten(1)
        window = weight.shape[1] // channels
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments)))
        variance = float(moments.output_statistics(weight)[1].sum())
        return cls(layer, moments, window, weight, inverse, 1 / max(variance, SMALLEST_SPREAD))

    def best_without(self, channels: torch.Tensor) -> Layer:
        """Return the layer that reads only ``channels``, in closed form: no rounding adds up."""
        weight, hessian = self.layer.weight.flatten(1), damped(self.moments)
        columns = columns_of(channels, self.window)
        factor = torch.linalg.cholesky(hessian[columns][:, columns])
        best = torch.cholesky_solve((weight @ hessian[:, columns]).T, factor).T
        change = weight.clone()
        change[:, columns] -= best
        bias = self.layer.bias + change @ self.moments.mean[0]
        shape = (len(weight), -1, *self.layer.weight.shape[2:])
        return Layer(best.reshape(shape) if len(shape) > 2 else best, bias)


def remove_channels(
    readers: Mapping[str, Reader], widths: Iterable[int]
) -> dict[int, ChannelChoice]:
    """Return for each width what to keep, and the best layers for it; the readers are changed."""
    found, first = {}, next(iter(readers.values()))
    channels = torch.arange(len(first.inverse) // first.window, device=first.inverse.device)
    for width in sorted(widths, reverse=True):
        while len(channels) > width:
            count = min(max(1, len(channels) // GROUP), len(channels) - width)
            costs = sum(
                reader.scale * removal_costs(reader.weight, reader.inverse, reader.window)
                for reader in readers.values()
            )
            removed = costs.topk(count, largest=False).indices
            for reader in readers.values():
                reader.weight, reader.inverse = without(
                    reader.weight, reader.inverse, columns_of(removed, reader.window)
                )
            stays = torch.ones(len(channels), dtype=torch.bool, device=channels.device)
            stays[removed] = False
            channels = channels[stays]
        layers = {name: reader.best_without(channels) for name, reader in readers.items()}
        found[width] = ChannelChoice(channels, layers)
    return found


def damped(moments: Moments) -> torch.Tensor:
    """Return the covariance of the inputs with a ridge."""
    return with_ridge(moments.covariance, DAMPING * moments.squares)[0]


def removal_costs(weight: torch.Tensor, inverse: torch.Tensor, window: int) -> torch.Tensor:
    """Return what each channel's removal costs alone: trace(W_c ((H⁻¹)_cc)⁻¹ W_cᵀ).

    The weight is (O, channels * window), H⁻¹ (channels * window, channels * window).
    """
    blocks = inverse.unflatten(0, (-1, window)).unflatten(2, (-1, window))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (channels, window, window)
    groups = weight.unflatten(1, (-1, window)).permute(1, 2, 0)  # (channels, window, O)
    halves = torch.linalg.solve_triangular(torch.linalg.cholesky(own), groups, upper=False)
    return halves.square().sum((1, 2))


def without(
    weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and H⁻¹ without some columns, what is left having made up for them."""
    stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    stays[gone] = False
    shared = inverse[gone][:, stays]
    factor = torch.linalg.cholesky(inverse[gone][:, gone])
    carry = torch.cholesky_solve(shared, factor)
    inverse = inverse[stays][:, stays].addmm_(shared.T, carry, alpha=-1)
    return weight[:, stays] - weight[:, gone] @ carry, inverse


def columns_of(channels: torch.Tensor, window: int) -> torch.Tensor:
    """Return the columns of channels."""
    return (channels[:, None] * window + torch.arange(window, device=channels.device)).flatten()
