"""Which inputs of a convolution can go, and what its other weights become: optimal brain surgeon.

A convolution's output at one position is W·x, with x the inputs under its window and a 1 for the
bias. Over many positions the squared change of the output is quadratic in W, with H = E[x xᵀ]: so
the best weights without some channels have a closed form, and so has what they cost. The cheapest
channels go first, a few at a time, and H⁻¹ follows (Hassibi and Stork, 1992; for whole structures
ZipLM: Kurtic et al., 2023, https://arxiv.org/abs/2302.04089).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

WINDOW = 9  # weights of a channel, in a 3×3 convolution
# Of H's mean diagonal, added to its diagonal: few images leave some directions unknown.
DAMPING = 0.01
# The least mean diagonal that damping is a share of: all inputs of a layer may be zero.
SMALLEST_SQUARE = 1e-12
# The channels of which one removal takes one: what is cheap together changes slowly.
GROUP = 32


@dataclass(frozen=True)
class Kept:
    """What is left of a convolution's inputs.

    Attributes:
        channels: Numbers of those kept, sorted.
        weight: That reads them, shape (O, 9·channels + 1), the bias last.
    """

    channels: torch.Tensor
    weight: torch.Tensor


def windows(maps: torch.Tensor, positions: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Return the inputs of a 3×3 convolution (padding 1) at some positions, and a 1.

    Args:
        maps: Shape (N, C, H, W).
        positions: int64, shape (N, P): row · W / stride + column of each output.
        stride: Of the convolution.

    Returns:
        FP32, shape (N·P, 9·C + 1), in the order of a weight's ``flatten(1)``.
    """
    width = maps.shape[3] // stride
    padded = F.pad(maps, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    step = torch.arange(3, device=maps.device)
    rows = stride * (positions // width)[:, :, None, None] + step[:, None]
    columns = stride * (positions % width)[:, :, None, None] + step
    image = torch.arange(len(maps), device=maps.device)[:, None, None, None]
    found = padded[image, rows, columns].permute(0, 1, 4, 2, 3).flatten(0, 1).flatten(1).float()
    return F.pad(found, (0, 1), value=1.0)


def at_positions(maps: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return what maps (N, C, H, W) hold at positions (N, P): FP32, shape (N·P, C)."""
    index = positions[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1).float()


def refit(
    gram: torch.Tensor, cross: torch.Tensor, anchor: torch.Tensor, share: float = DAMPING
) -> torch.Tensor:
    """Return the weights of least squares, near ``anchor`` where little is known.

    Args:
        gram: E[x xᵀ], shape (9·C + 1, 9·C + 1), the last row and column of the constant 1.
        cross: E[y xᵀ], shape (O, 9·C + 1), y being the outputs that are wanted.
        anchor: Weights, shape (O, 9·C + 1).
        share: Of the mean diagonal, how much the anchor weighs.
    """
    damping = _damping(gram, share)
    return _divide(cross + damping * anchor, gram + damping.diag())


def remove_channels(
    gram: torch.Tensor, weight: torch.Tensor, widths: Iterable[int]
) -> dict[int, Kept]:
    """Return, for each width, the channels to keep and the weights that make the best of them.

    Args:
        gram: E[x xᵀ], shape (9·C + 1, 9·C + 1), the last row and column of the constant 1.
        weight: Of all channels, shape (O, 9·C + 1), the bias last.
        widths: From 1 to C.
    """
    hessian = gram + _damping(gram).diag()
    wanted, found = set(widths), {}
    channels = torch.arange(len(gram) // WINDOW, device=gram.device)
    inverse, left = torch.cholesky_inverse(torch.linalg.cholesky(hessian)), weight
    while wanted:
        if len(channels) in wanted:
            columns = _columns(channels, len(gram) // WINDOW)
            # Not what the updates have come to, with their rounding errors, but its closed form.
            best = _divide(weight @ hessian[:, columns], hessian[columns][:, columns])
            found[len(channels)] = Kept(channels, best)
            wanted.remove(len(channels))
            continue
        count = min(max(1, len(channels) // GROUP), len(channels) - max(wanted))
        removed = cheapest(left, inverse, count)
        left, inverse = without(left, inverse, removed)
        stays = torch.ones(len(channels), dtype=torch.bool, device=channels.device)
        stays[removed] = False
        channels = channels[stays]
    return found


def output_statistics(
    gram: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each output without its bias, each of shape (O,)."""
    reading = weight[:, :-1]
    mean = reading @ gram[:-1, -1]
    variance = ((reading @ gram[:-1, :-1]) * reading).sum(1) - mean**2
    return mean, variance.clamp_min(0)


def cheapest(weight: torch.Tensor, inverse: torch.Tensor, count: int) -> torch.Tensor:
    """Return the channels that cost least one by one: trace(W_c ((H⁻¹)_cc)⁻¹ W_cᵀ).

    Args:
        weight: Shape (O, 9·C + 1).
        inverse: H⁻¹, shape (9·C + 1, 9·C + 1).
        count: How many to return.
    """
    total = len(inverse) // WINDOW
    blocks = inverse[:-1, :-1].unflatten(0, (total, WINDOW)).unflatten(2, (total, WINDOW))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (C, 9, 9)
    groups = weight[:, :-1].unflatten(1, (total, WINDOW)).permute(1, 2, 0)  # (C, 9, O)
    factors = torch.linalg.cholesky(own)
    halves = torch.linalg.solve_triangular(factors, groups, upper=False)
    return halves.square().sum((1, 2)).topk(count, largest=False).indices


def without(
    weight: torch.Tensor, inverse: torch.Tensor, removed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and H⁻¹ without some channels, what is left having made up for them."""
    stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    gone = _columns(removed, len(inverse) // WINDOW)[:-1]
    stays[gone] = False
    shared = inverse[gone][:, stays]
    factor = torch.linalg.cholesky(inverse[gone][:, gone])
    carry = torch.cholesky_solve(shared, factor)
    inverse = inverse[stays][:, stays].addmm_(shared.T, carry, alpha=-1)
    return weight[:, stays] - weight[:, gone] @ carry, inverse


def _damping(gram: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """Return what is added to a Gram matrix's diagonal: nothing to the constant's."""
    diagonal = gram.diagonal()
    mean = diagonal[:-1].mean().clamp_min(SMALLEST_SQUARE)
    return F.pad((share * mean).expand(len(diagonal) - 1), (0, 1))


def _divide(cross: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return cross·hessian⁻¹ of a positive definite matrix."""
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(hessian)).T


def _columns(channels: torch.Tensor, total: int) -> torch.Tensor:
    """Return the columns of ``channels`` in a weight of ``total`` channels, and the constant's."""
    window = torch.arange(WINDOW, device=channels.device)
    columns = (channels[:, None] * WINDOW + window).flatten()
    return torch.cat([columns, columns.new_tensor([total * WINDOW])])
