"""How wide each block of a slim network is: what a width costs in context against what it saves.

A block that may be narrowed for nothing in the dense network may not in one that is narrow
everywhere, for errors add up. So each block's curve is measured in a network whose other blocks
are narrow: the divergence of the logits from the dense network's, which needs no labels. With the
curves taken to add up, the best widths for any number of multiply-adds follow exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from common.command import cli
from common.images.data import normalize
from common.network.branching import FoldedNetwork, pool
from common.network.resnet import BLOCKS
from pruning.channels.slimming import slim_block
from pruning.channels.surgeon import Kept

CURVE_IMAGES = 256
BATCH_SIZE = 64
BUDGET_STEPS = 512  # in which multiply-adds are counted

STEP = 16  # channels: INT8 kernels round a layer's width up to as many

Paths = Mapping[str, Mapping[int, Kept]]
Curves = Mapping[str, Mapping[int, float]]


def width_grid(width: int) -> list[int]:
    """Return the widths that a block of ``width`` inner channels may get, itself the last.

    Eight of them; fewer where that would be finer than ``STEP``, except in networks so narrow that
    they have no two steps. Not less than an eighth: so narrow a block leaves no room to make up for
    what the others lost, which the curves, measured before the repair, do not see.
    """
    step = max(width // 8 // STEP * STEP, STEP if width >= 2 * STEP else 1)
    return [*range(step, width, step), width]


@torch.inference_mode()
def measure_curves(
    dense: FoldedNetwork, paths: Paths, context: Mapping[str, int], images: torch.Tensor
) -> Curves:
    """Measure each block's divergence at every width, the others being as wide as in ``context``.

    Args:
        dense: In the precision to run in.
        paths: For each block, what is kept of it at every width.
        context: Widths.
        images: uint8, shape (N, 3, 32, 32).

    Returns:
        For each block and width the mean divergence in nats, over that at its largest width.
    """
    around = [slim_block(dense.blocks[name], paths[name][context[name]]) for name in BLOCKS]
    totals = {name: dict.fromkeys(paths[name], 0.0) for name in BLOCKS}
    for batch in cli.progress(images.split(BATCH_SIZE), "widths"):
        inputs = normalize(batch).to(dense.stem.weight.dtype)
        stem = dense.stem(inputs).relu_()
        expected = _logits(dense, stem, list(dense.blocks.values())).log_softmax(1)
        x = stem
        for index, name in enumerate(BLOCKS):
            for width, kept in paths[name].items():
                changed = slim_block(dense.blocks[name], kept)
                logits = _logits(dense, x, [changed, *around[index + 1 :]])
                totals[name][width] += float(
                    F.kl_div(logits.log_softmax(1), expected, reduction="sum", log_target=True)
                )
            x = around[index](x)
    return {
        name: {width: (total - curve[max(curve)]) / len(images) for width, total in curve.items()}
        for name, curve in totals.items()
    }


def _logits(network: FoldedNetwork, x: torch.Tensor, blocks: Sequence) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return network.classify(pool(x))


def choose_widths(
    curves: Curves, costs: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """Return the widths of least total divergence whose costs add up to at most ``budget``.

    Exact up to the rounding of costs to ``BUDGET_STEPS`` steps (upwards): a knapsack. Where nothing
    but the narrowest network is within the budget, rounding must not cost that.

    Raises:
        ValueError: The narrowest network costs more.
    """
    unit = budget / BUDGET_STEPS
    best = np.zeros(BUDGET_STEPS + 1)  # the least divergence that each number of steps allows
    choices = []
    for name, curve in curves.items():
        trial = np.full((len(curve), BUDGET_STEPS + 1), np.inf)
        for row, (width, divergence) in enumerate(curve.items()):
            steps = int(np.ceil(costs[name][width] / unit - 1e-9))
            if steps <= BUDGET_STEPS:
                trial[row, steps:] = best[: BUDGET_STEPS + 1 - steps] + divergence
        choices.append(trial.argmin(axis=0))
        best = trial.min(axis=0)
    if not np.isfinite(best[-1]):
        narrowest = {name: min(curve) for name, curve in curves.items()}
        if sum(costs[name][width] for name, width in narrowest.items()) > budget * (1 + 1e-9):
            raise ValueError(f"no widths cost as little as {budget:g}")
        return narrowest
    widths, left = {}, BUDGET_STEPS
    for (name, curve), choice in zip(reversed(curves.items()), reversed(choices), strict=True):
        widths[name] = list(curve)[choice[left]]
        left -= int(np.ceil(costs[name][widths[name]] / unit - 1e-9))
    return dict(reversed(widths.items()))
