"""How wide each group of channels is: what a width costs in context against what it saves.

A group that may be narrowed for nothing in the dense network may not in one that is narrow
everywhere, for errors add up. So each group's curve is measured in a network whose other groups are
narrow: the divergence of the logits from the dense network's, which needs no labels. With the
curves taken to add up, the best widths for any number of multiply-adds follow exactly.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from common.command import cli
from common.images.data import ImageSet
from common.network.execution import Network
from pruning.channels.groups import ChannelGroup
from pruning.channels.slimming import slim_network
from pruning.channels.surgeon import ChannelChoice

CURVE_IMAGES = 256
BATCH_SIZE, MEMORY_BYTES = 64, 1_000_000_000  # images at a time, less if they take more memory
BUDGET_STEPS = 512  # steps in which costs are counted

STEP = 16  # channels: INT8 kernels round a layer's width up to a multiple of this

Choices = Mapping[str, Mapping[int, ChannelChoice]]
Curves = Mapping[str, Mapping[int, float]]


def width_grid(width: int) -> list[int]:
    """Return the widths that a group of ``width`` channels may get, itself the last.

    Eighths, and three sixteenths of wide groups, many of whose channels can go; fewer where that
    would be finer than ``STEP``, except in networks so narrow that they have no two steps. Not less
    than an eighth: so narrow a layer leaves no room to make up for what the others lost, which the
    curves, measured before the repair, do not see.
    """
    step = max(width // 8 // STEP * STEP, STEP if width >= 2 * STEP else 1)
    half = step // 2 // STEP * STEP
    return [*sorted({*range(step, width, step), step + half}), width]


@torch.inference_mode()
def measure_curves(
    dense: Network, groups: Mapping[str, ChannelGroup], choices: Choices,
    context: Mapping[str, int], images: ImageSet,
) -> Curves:  # fmt: skip
    """Measure each group's divergence at every width, the others being as wide as in ``context``.

    ``dense`` is in the precision to run in. ``choices`` holds for each group and width the channels
    that are kept. Labels are not used. A curve is the mean divergence in nats, over that at the
    largest width, and one standard error: what only seems to be free is not chosen where it saves
    little.
    """
    graph, around = dense.graph, {name: choices[name][width] for name, width in context.items()}
    narrow, variants, starts = slim_network(dense, groups, around), {}, {}
    for name, group in groups.items():
        # Variants run on from the values before the group that operations in it or behind it read.
        changed = graph.affected_by(group.producers)
        starts[name] = {source for one in changed for source in graph[one].inputs} - changed
        for width, choice in choices[name].items():
            varied = slim_network(dense, groups, {**around, name: choice})
            own = {layer: varied.layers[layer] for layer in group.touched if layer in varied.layers}
            # All other layers are shared among the variants.
            variants[name, width] = Network(varied.graph, {**narrow.layers, **own})
    wanted = sorted(set().union(*starts.values()))
    dtype = next(iter(dense.layers.values())).weight.dtype
    numbers = sum(math.prod(dense.shapes[name]) for name in wanted)
    batch_size = max(1, min(BATCH_SIZE, MEMORY_BYTES // (4 * max(numbers, 1))))
    found = {variant: [] for variant in variants}
    for batch in cli.progress(images.images.split(batch_size), "widths"):
        inputs = {graph.input: images.normalize(batch).to(dtype)}
        expected = dense.run(inputs, [graph.output])[graph.output].float().log_softmax(1)
        values = narrow.run(inputs, wanted)
        for variant, network in variants.items():
            given = {value: values[value] for value in starts[variant[0]]}
            logits = network.run(given, [graph.output])[graph.output].float()
            lost = F.kl_div(logits.log_softmax(1), expected, reduction="none", log_target=True)
            found[variant].append(lost.sum(1))
    return {
        name: as_curve({width: torch.cat(found[name, width]) for width in choices[name]})
        for name in groups
    }


def as_curve(lost: Mapping[int, torch.Tensor]) -> dict[int, float]:
    """Return the mean over images, and a standard error, of what widths lose over the largest.

    A width counts as losing no less than any larger one. ``lost`` is by width, for each image (N,).
    """
    curve, least = {}, 0.0
    for width in sorted(lost, reverse=True):
        over = lost[width] - lost[max(lost)]
        error = over.std(correction=0) / math.sqrt(len(over))
        curve[width] = least = max(least, float(over.mean() + error))
    return dict(sorted(curve.items()))


def choose_widths(
    curves: Curves, costs: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """Return the widths of least total divergence whose costs add up to at most ``budget``.

    Exact up to the rounding of costs to ``BUDGET_STEPS`` steps (upwards): a knapsack. The narrowest
    network is within the budget, so it is returned where rounding leaves none.
    """
    unit = budget / BUDGET_STEPS
    best = np.zeros(BUDGET_STEPS + 1)  # the least divergence that each number of steps allows
    options = []
    for name, curve in curves.items():
        trial = np.full((len(curve), BUDGET_STEPS + 1), np.inf)
        for row, (width, divergence) in enumerate(curve.items()):
            steps = int(np.ceil(costs[name][width] / unit - 1e-9))
            if steps <= BUDGET_STEPS:
                trial[row, steps:] = best[: BUDGET_STEPS + 1 - steps] + divergence
        options.append(trial.argmin(axis=0))
        best = trial.min(axis=0)
    if not np.isfinite(best[-1]):
        return {name: min(curve) for name, curve in curves.items()}
    widths, left = {}, BUDGET_STEPS
    for (name, curve), option in zip(reversed(curves.items()), reversed(options), strict=True):
        widths[name] = list(curve)[option[left]]
        left -= int(np.ceil(costs[name][widths[name]] / unit - 1e-9))
    return dict(reversed(widths.items()))
