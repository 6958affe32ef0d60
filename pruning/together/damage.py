"""What pruning each layer costs where the other layers are pruned too.

A layer's sensitivity in the dense network says little about a network that is pruned everywhere:
the errors of many layers, each harmless alone, add up until one more decides. So the curves are
measured in context: around the network as global pruning leaves it, each layer in turn goes from
all its weights to few, the others staying as they are. All of that is one branching walk.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from common.command import cli
from common.images.data import normalize
from common.network.branching import ALL_ROWS, FoldedNetwork, branch_logits, trace_dense
from common.network.resnet import ResNet18, prunable_layers
from pruning.alone.walk import Variants
from pruning.masks import pruned_count
from pruning.together.allocation import DamageCurve

# From all of a layer's weights to one in 64, each step half of the one before.
AMOUNTS = (0.0, *(1 - 0.5**halvings for halvings in range(1, 7)))
BATCH_SIZE = 20


@torch.inference_mode()
def measure_damage(
    model: ResNet18, context: ResNet18, layers: list[str], images: torch.Tensor, fast: bool
) -> dict[str, DamageCurve]:
    """Measure how many predictions change as each layer alone goes through ``AMOUNTS``.

    A change is counted against the dense network's prediction, right or wrong: that needs no
    labels, and has less noise than the difference of two accuracies.

    Args:
        model: Dense; not changed.
        context: The same network, all of it pruned; not changed.
        layers: In network order.
        images: uint8, shape (N, 3, 32, 32), on the models' device.
        fast: Run in bf16.

    Returns:
        For each layer its curve, from nothing pruned; the damage is a fraction of the images.
    """
    dense, around = FoldedNetwork.of(model), FoldedNetwork.of(context)
    regrown = copy.deepcopy(context)  # its batch norms stay its own
    for name in layers:
        prunable_layers(regrown)[name].weight.data = prunable_layers(model)[name].weight.data
    variants = [Variants.of(regrown, layers, amount, fast) for amount in AMOUNTS]
    parts = [variant.fast if fast else variant.exact for variant in variants]
    if fast:
        dense, around = dense.to(torch.bfloat16), around.to(torch.bfloat16)
    dtype = around.stem.weight.dtype
    changed = torch.zeros(len(AMOUNTS), len(layers), device=images.device)
    for batch in cli.progress(images.split(BATCH_SIZE), "sensitivities"):
        inputs = normalize(batch).to(dtype)
        expected = dense.classify(trace_dense(dense, inputs).features).argmax(dim=1)
        trace = trace_dense(around, inputs)
        for amount, part in enumerate(parts):
            logits = branch_logits(around, trace, part, dict.fromkeys(part, ALL_ROWS))
            found = logits.argmax(dim=1).view(len(layers), len(batch))
            changed[amount] += (found != expected).sum(dim=1)
    damage = (changed / len(images)).cpu().double().numpy()
    return {
        name: _curve(prunable_layers(model)[name].weight.numel(), damage[:, index], len(images))
        for index, name in enumerate(layers)
    }


def _curve(weights: int, damage: np.ndarray, images: int) -> DamageCurve:
    """Make a curve from the damage at ``AMOUNTS``: what pruning gains by chance counts nothing.

    Each step costs one image more than was seen. Where no prediction of a few hundred changed, one
    of the next few hundred may: taken for free, the steps of small layers would all come first,
    though they save next to nothing and together cost a point.
    """
    counts = [pruned_count(weights, amount) for amount in AMOUNTS]
    distinct = np.unique(counts, return_index=True)[1]  # tiny layers round to the same count
    rising = np.maximum.accumulate(damage - damage[0]) + np.arange(len(AMOUNTS)) / images
    return DamageCurve(np.array(counts)[distinct], rising[distinct])
