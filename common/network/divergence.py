"""How far the inputs of a batch norm are from what it saw in training."""

from collections.abc import Iterable

import torch
from torch import nn


def divergence(norm: nn.Module, outputs: Iterable[torch.Tensor]) -> float:
    """Return how far a batch norm's inputs are from its running statistics; 0 if it has none.

    It is the divergence of two normal distributions, KL(observed || running), mean over channels.
    ``outputs`` is what the layer before it gives for each batch of images, (N, C, H, W).
    """
    mean, variance = norm.running_mean, norm.running_var
    if variance is None or torch.equal(variance, variance[:1].expand_as(variance)):
        return 0.0  # folded into the weights, as in a file of coded weights
    observed_mean, observed = _moments(outputs)
    alive = (variance > 1e-6 * variance.max()) & (observed > 1e-6 * observed.max())
    ratio = observed[alive] / variance[alive]
    shift = (observed_mean - mean)[alive].square() / variance[alive]
    return float((0.5 * (ratio + shift - 1 - ratio.log())).sum() / alive.sum().clamp(min=1))


def _moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each channel (float64) over batches, of which one is kept."""
    count, sums, squares = 0, 0.0, 0.0
    for values in batches:
        variance, mean = (x.double() for x in torch.var_mean(values, (0, 2, 3), correction=0))
        size = values.numel() // len(mean)
        count += size
        sums += size * mean
        squares += size * (variance + mean.square())
    mean = sums / count
    return mean, squares / count - mean.square()
