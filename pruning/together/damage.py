"""What pruning each layer costs where the other layers are pruned too.

A layer's sensitivity in the dense network says little about a network that is pruned everywhere,
for the errors of many layers add up. So the curves are measured in the network that global pruning
left: each layer in turn goes from all its weights to few, while the others stay pruned. The
branching walk does this for all layers at once.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from common.command import cli
from common.images.data import ImageSet
from common.network.branching import Variant, branch_logits, start_values
from common.network.execution import Network
from common.network.tracing import trace_network
from pruning.masks import l1_masks, masked_layers, pruned_count
from pruning.together.allocation import DamageCurve

# From all of a layer's weights to one in 64; each step halves what is left.
AMOUNTS = (0.0, *(1 - 0.5**halvings for halvings in range(1, 7)))
BATCH_SIZE = 20


def measure_damage(
    model: nn.Module,
    context: nn.Module,
    weights: Mapping[str, torch.Tensor],
    images: ImageSet,
    fast: bool,
) -> dict[str, DamageCurve]:
    """Measure how many predictions change as each layer alone is pruned by each of ``AMOUNTS``.

    A change is counted against the dense network's prediction, right or wrong. That needs no
    labels and has less noise than the difference of two accuracies.

    Args:
        model: Dense network; not changed.
        context: The same network with all layers pruned; not changed.
        weights: Dense weight of each layer to measure.
        images: Images to run, on the models' device.
        fast: Whether to run in bf16.

    Returns:
        The layers' curves, from nothing pruned; the damage is a fraction of the images.
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

    Each step costs one image more than was seen, for a change may be too rare to be seen in a few
    hundred images. If such steps were free, those of small layers would come first, although they
    save next to nothing and together cost a point.
    """
    counts = [pruned_count(weights, amount) for amount in AMOUNTS]
    distinct = np.unique(counts, return_index=True)[1]  # tiny layers round to the same count
    rising = np.maximum.accumulate(damage - damage[0]) + np.arange(len(AMOUNTS)) / images
    return DamageCurve(np.array(counts)[distinct], rising[distinct])
