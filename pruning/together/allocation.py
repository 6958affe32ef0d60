"""How many weights of each layer are pruned when the whole network loses a given fraction.

The smallest weights of a layer go first; what they cost decides how many. A layer's cost in the
dense network says little about a network that is pruned everywhere, for the errors of many layers
add up. So it is measured in the network that global pruning left: each layer in turn goes from all
its weights to few, while the others stay pruned. The branching walk does this for all layers at
once.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from common.command import cli
from common.images.data import ImageSet
from common.network.branching import Variant, branch_logits, start_values
from common.network.execution import Network
from common.network.graph import CONVOLUTION, LINEAR, WEIGHTED
from common.network.tracing import trace_network
from pruning.masks import l1_mask, l1_masks, masked_layers, pruned_count

SENSITIVITY, GLOBAL = "sensitivity", "global"
# From all of a layer's weights to one in 64; each step halves what is left.
AMOUNTS = (0.0, *(1 - 0.5**halvings for halvings in range(1, 7)))
BATCH_SIZE = 20


def weights_in_scope(
    network: Network, weights: Mapping[str, torch.Tensor], scope: str
) -> dict[str, torch.Tensor]:
    """Return the weights on the CPU of the layers in a scope, or raise a UserError for none."""
    kinds = {"linear": (LINEAR,), "conv": (CONVOLUTION,), "all": WEIGHTED}[scope]
    found = {name: w.cpu() for name, w in weights.items() if network.graph[name].kind in kinds}
    if not found:
        raise cli.UserError(f"--scope {scope}: the network has no such layer")
    return found


def global_masks(weights: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Prune the smallest weights of all layers together, as ``global_unstructured`` would."""
    together = torch.cat([weight.flatten() for weight in weights.values()])
    kept = l1_mask(together, pruned_count(together.numel(), sparsity))
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}


# --- by sensitivity ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamageCurve:
    """The cost of pruning one layer."""

    counts: np.ndarray  # numbers of pruned weights, rising from 0; int64, (points,)
    damage: np.ndarray  # cost of each, in a unit that adds up over layers; (points,)

    def convex(self) -> "DamageCurve":
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
) -> dict[str, torch.Tensor]:
    """Prune the weights that cost least according to the layers' damage curves."""
    total = sum(weight.numel() for weight in weights.values())
    ends = sum(int(curve.counts[-1]) for curve in curves.values())
    # The curves' ends are rounded: together they may be a few weights short of the total.
    counts = greedy_counts(curves, min(pruned_count(total, sparsity), ends))
    return {name: l1_mask(weight, counts[name]) for name, weight in weights.items()}


def measure_damage(
    model: nn.Module, context: nn.Module, weights: Mapping[str, torch.Tensor], images: ImageSet,
    fast: bool,
) -> dict[str, DamageCurve]:  # fmt: skip
    """Measure how many predictions change as each layer alone is pruned by each of ``AMOUNTS``.

    A change is counted against the dense network's prediction, right or wrong. That needs no labels
    and has less noise than the difference of two accuracies. ``context`` is the dense ``model``
    with all layers pruned, ``weights`` are dense ones. If ``fast``, it runs in bf16. The damage is
    a fraction of the images.
    """
    regrown = copy.deepcopy(context)  # dense weights, but with the batch norms of the context
    for name, weight in weights.items():
        module = regrown.get_submodule(name)
        module.weight.data = weight.to(module.weight.device)
    dense, around, grown = (trace_network(m, images.shape) for m in (model, context, regrown))
    if fast:
        dense, around, grown = (network.to(torch.bfloat16) for network in (dense, around, grown))
    variants = [masked_layers(grown, l1_masks(weights, amount)) for amount in AMOUNTS]
    changed = _count_changed(dense, around, variants, images)
    damage = (changed / len(images)).cpu().double().numpy()
    return {
        name: _curve(weight.numel(), damage[:, index], len(images))
        for index, (name, weight) in enumerate(weights.items())
    }


@torch.inference_mode()
def _count_changed(
    dense: Network, around: Network, variants: Sequence[Mapping[str, Variant]], images: ImageSet
) -> torch.Tensor:
    """Return how many predictions of ``dense`` change: shape (amounts, layers)."""
    layers, graph = list(variants[0]), around.graph
    wanted = start_values(graph, layers)
    changed = torch.zeros(len(variants), len(layers), device=images.images.device)
    count = math.ceil(len(images) / BATCH_SIZE)
    for inputs, _ in cli.progress(images.batches(BATCH_SIZE), "sensitivities", count):
        expected = dense(inputs).argmax(dim=1)
        values = around.run({graph.input: inputs}, wanted)
        for amount, part in enumerate(variants):
            found = branch_logits(around, values, part).argmax(dim=1)
            changed[amount] += (found.view(len(layers), -1) != expected).sum(dim=1)
    return changed


def _curve(weights: int, damage: np.ndarray, images: int) -> DamageCurve:
    """Make a curve from the damage at ``AMOUNTS``; gains by chance count as no damage.

    Each step costs one image more than was seen: a change may be too rare to be seen in a few
    hundred images, and if they were free, steps of small layers would come first and save next to
    nothing.
    """
    counts = [pruned_count(weights, amount) for amount in AMOUNTS]
    distinct = np.unique(counts, return_index=True)[1]  # tiny layers round to the same count
    rising = np.maximum.accumulate(damage - damage[0]) + np.arange(len(AMOUNTS)) / images
    return DamageCurve(np.array(counts)[distinct], rising[distinct])
