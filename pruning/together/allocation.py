"""How many weights each layer loses when the network as a whole loses a given fraction.

Whatever the allocation, the smallest weights of a layer go first; allocations differ in how the
total is shared out. Each is a function of the total alone and only ever takes more as it rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from common.network.resnet import ResNet18, prunable_layers
from pruning.masks import l1_mask, pruned_count

# The controls: the same amount of every layer, whichever weights chance takes; of whole channels,
# those whose filters have the smallest norm.
RANDOM, NORM = "random", "norm"

Masks = dict[str, torch.Tensor]


def weights_in_scope(model: ResNet18, scope: str) -> dict[str, torch.Tensor]:
    """Return the weights that a search may prune, by layer, on the CPU.

    Args:
        model: On any device.
        scope: ``linear``, ``conv`` or ``all``.
    """
    return {
        name: layer.weight.detach().cpu()
        for name, layer in prunable_layers(model).items()
        if scope == "all" or (name == "linear") == (scope == "linear")
    }


def uniform_masks(weights: Mapping[str, torch.Tensor], sparsity: float) -> Masks:
    """Prune the same fraction of every layer, as ``l1_unstructured`` on each would."""
    return {
        name: l1_mask(weight, pruned_count(weight.numel(), sparsity))
        for name, weight in weights.items()
    }


def global_masks(weights: Mapping[str, torch.Tensor], sparsity: float) -> Masks:
    """Prune the smallest weights of all layers together, as ``global_unstructured`` would."""
    together = torch.cat([weight.flatten() for weight in weights.values()])
    kept = l1_mask(together, pruned_count(together.numel(), sparsity))
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {
        name: part.view_as(weight)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def random_masks(weights: Mapping[str, torch.Tensor], sparsity: float, seed: int) -> Masks:
    """Prune the same fraction of every layer, at random; the same seed keeps nested choices."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()
    }
    return uniform_masks(scores, sparsity)


# --- by sensitivity ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamageCurve:
    """What pruning one layer costs.

    Attributes:
        counts: Numbers of pruned weights, rising from 0; int64, shape (points,).
        damage: What each costs, in any unit that adds up over layers; shape (points,).
    """

    counts: np.ndarray
    damage: np.ndarray

    def convex(self) -> DamageCurve:
        """Return the lower convex hull: the points that a budget ever needs.

        Between two of its points part of the weights of the step are taken, at its mean cost.
        """
        hull: list[int] = []
        for point in range(len(self.counts)):
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) >= self._slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return DamageCurve(self.counts[hull], self.damage[hull])

    def _slope(self, first: int, second: int) -> float:
        rise = self.damage[second] - self.damage[first]
        return float(rise / (self.counts[second] - self.counts[first]))


def greedy_counts(curves: Mapping[str, DamageCurve], total: int) -> dict[str, int]:
    """Share out ``total`` pruned weights: always where the next cost least for each weight.

    On convex curves that is the least damage for the total (Fox, 1966, doi:10.1287/opre.14.2.210),
    exactly so wherever the total ends a step.

    Args:
        curves: One a layer.
        total: At most what the curves' last points add up to.

    Returns:
        For each layer its number of pruned weights; they add up to ``total``.
    """
    steps = []
    for name, curve in curves.items():
        hull = curve.convex()
        points = zip(hull.counts.tolist(), hull.damage.tolist(), strict=True)
        for (first, before), (last, after) in pairwise(points):
            steps.append(((after - before) / (last - first), last - first, name))
    counts, left = dict.fromkeys(curves, 0), total
    for _, size, name in sorted(steps, key=lambda step: step[0]):  # a hull's slopes rise
        taken = min(size, left)
        counts[name] += taken
        left -= taken
    if left:
        raise ValueError(f"the curves end {left} weights before {total}")
    return counts


def sensitivity_masks(
    weights: Mapping[str, torch.Tensor], curves: Mapping[str, DamageCurve], sparsity: float
) -> Masks:
    """Prune of each layer as much as costs least, by the layers' damage curves."""
    total = sum(weight.numel() for weight in weights.values())
    ends = sum(int(curve.counts[-1]) for curve in curves.values())
    # Layers end on whole weights each, which may add up to a few less than their total's share.
    counts = greedy_counts(curves, min(pruned_count(total, sparsity), ends))
    return {name: l1_mask(weight, counts[name]) for name, weight in weights.items()}
