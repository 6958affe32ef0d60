"""How many weights of each layer are pruned when the whole network loses a given fraction.

The smallest weights of a layer go first. What they cost decides how many go in each layer, see
:func:`sensitivity_masks`. A higher total prunes at least as many weights of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from common.command.cli import UserError
from common.network.execution import Network
from common.network.graph import CONVOLUTION, LINEAR, WEIGHTED
from pruning.masks import l1_mask, pruned_count

SENSITIVITY, GLOBAL = "sensitivity", "global"
RANDOM = "random"  # the control: the same fraction of every layer, chosen at random

Masks = dict[str, torch.Tensor]


def weights_in_scope(
    network: Network, weights: Mapping[str, torch.Tensor], scope: str
) -> dict[str, torch.Tensor]:
    """Return the weights on the CPU of the layers in a scope: ``linear``, ``conv`` or ``all``.

    Raises:
        UserError: The network has no layer of that kind.
    """
    kinds = {"linear": (LINEAR,), "conv": (CONVOLUTION,), "all": WEIGHTED}[scope]
    found = {name: w.cpu() for name, w in weights.items() if network.graph[name].kind in kinds}
    if not found:
        raise UserError(f"--scope {scope}: the network has no such layer")
    return found


def global_masks(weights: Mapping[str, torch.Tensor], sparsity: float) -> Masks:
    """Prune the smallest weights of all layers together, as ``global_unstructured`` would."""
    together = torch.cat([weight.flatten() for weight in weights.values()])
    kept = l1_mask(together, pruned_count(together.numel(), sparsity))
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}


def random_masks(weights: Mapping[str, torch.Tensor], sparsity: float, seed: int) -> Masks:
    """Prune the same fraction of every layer, at random; with one seed, choices are nested."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}
    return {n: l1_mask(s, pruned_count(s.numel(), sparsity)) for n, s in scores.items()}


# --- by sensitivity ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamageCurve:
    """The cost of pruning one layer."""

    counts: np.ndarray  # numbers of pruned weights, rising from 0; int64, (points,)
    damage: np.ndarray  # cost of each, in a unit that adds up over layers; (points,)

    def convex(self) -> DamageCurve:
        """Return the lower convex hull.

        Between two of its points the cost is interpolated: part of the weights are pruned.
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
    """Distribute ``total`` pruned weights over layers, always where the next weights cost least.

    On convex curves this gives the least damage (Fox, 1966, doi:10.1287/opre.14.2.210), exactly
    wherever the total ends a step. The total is at most the sum of the curves' last counts.
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
    """Prune the weights that cost least according to the layers' damage curves."""
    total = sum(weight.numel() for weight in weights.values())
    ends = sum(int(curve.counts[-1]) for curve in curves.values())
    # The curves' ends are rounded: together they may be a few weights short of the total.
    counts = greedy_counts(curves, min(pruned_count(total, sparsity), ends))
    return {name: l1_mask(weight, counts[name]) for name, weight in weights.items()}
