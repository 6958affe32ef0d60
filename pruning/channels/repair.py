"""Choice and repair of channels, block by block, on images without labels.

The dense network is run once: it says which channels of each block can go, and what every block
should add up to. A slim network is then repaired in network order: what reads the channels that are
left is refitted on what the slim blocks before it give, so that it also takes back their errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from common.command import cli
from common.images.data import normalize
from common.network.branching import FoldedNetwork
from common.network.resnet import BLOCKS, ResNet18
from pruning.channels.slimming import flat_weight, slim_block, slim_model
from pruning.channels.surgeon import (
    Kept,
    at_positions,
    output_statistics,
    refit,
    remove_channels,
    windows,
)

POSITIONS = 16  # of each map, to speak for it
BATCH_SIZE = 100


@dataclass(frozen=True)
class Dense:
    """What the repair needs of the dense network.

    Attributes:
        model: Not changed.
        network: It, folded, in the precision to run in.
        images: uint8, shape (N, 3, 32, 32).
        positions: For each block, int64, shape (N, P).
        targets: For each block, FP32, shape (N, P, O): its sums there, before the last ReLU.
        kept: For each block and width, what is best kept where all else is dense.
    """

    model: ResNet18
    network: FoldedNetwork
    images: torch.Tensor
    positions: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    kept: Mapping[str, Mapping[int, Kept]]


@torch.no_grad()
def measure_dense(
    model: ResNet18,
    images: torch.Tensor,
    widths: Mapping[str, Iterable[int]],
    seed: int,
    dtype: torch.dtype,
    fitted: int | None = None,
) -> Dense:
    """Run the dense network, and find what to keep of each block at every one of its ``widths``.

    Args:
        model: In eval mode.
        images: uint8, shape (N, 3, 32, 32), on the model's device.
        widths: For each block.
        seed: Of the positions.
        dtype: Precision to run in.
        fitted: The first so many images say what to keep; None for all.
    """
    fitted = len(images) if fitted is None else fitted
    exact = FoldedNetwork.of(model)
    network = exact.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    positions, targets = ({name: [] for name in BLOCKS} for _ in range(2))
    grams = dict.fromkeys(BLOCKS, 0)
    parts = [*images[:fitted].split(BATCH_SIZE), *images[fitted:].split(BATCH_SIZE)]
    seen = 0
    for batch in cli.progress(parts, "dense network"):
        seen += len(batch)
        x = network.stem(normalize(batch).to(dtype)).relu_()
        for name, block in network.blocks.items():
            hidden = block.conv1(x).relu_()
            residual = block.conv2(hidden)
            where = _draw(residual, generator)
            if seen <= fitted:
                inputs = windows(hidden, where)
                grams[name] += inputs.T @ inputs / (fitted * where.shape[1])
            total = residual.add_(block.shortcut_of(x))
            positions[name].append(where)
            targets[name].append(at_positions(total, where).unflatten(0, where.shape))
            x = total.relu_()
    return Dense(
        model,
        network,
        images,
        {name: torch.cat(found) for name, found in positions.items()},
        {name: torch.cat(found) for name, found in targets.items()},
        {
            name: remove_channels(grams.pop(name), flat_weight(exact.blocks[name]), widths[name])
            for name in cli.progress(BLOCKS, "choose channels")
        },
    )


def _draw(maps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the positions that speak for each map: int64, shape (N, P)."""
    total = maps.shape[2] * maps.shape[3]
    keys = torch.rand(len(maps), total, generator=generator)
    return keys.topk(min(POSITIONS, total), dim=1).indices.to(maps.device)


@torch.no_grad()
def repair(dense: Dense, widths: Mapping[str, int]) -> ResNet18:
    """Return the network of these ``widths``, each block refitted to what the dense one gives."""
    network, batches = dense.network, range(0, len(dense.images), BATCH_SIZE)
    rows = [slice(start, start + BATCH_SIZE) for start in batches]
    dtype = network.stem.weight.dtype
    streams = [network.stem(normalize(dense.images[r]).to(dtype)).relu_() for r in rows]
    kept, statistics = {}, {}
    for name, block in cli.progress(network.blocks.items(), "repair"):
        chosen, gram, cross = dense.kept[name][widths[name]], 0, 0
        slim, count = slim_block(block, chosen), dense.targets[name].flatten(0, 1).shape[0]
        for r, x in zip(rows, streams, strict=True):
            where = dense.positions[name][r]
            wanted = dense.targets[name][r].flatten(0, 1)
            wanted = wanted - at_positions(block.shortcut_of(x), where)
            inputs = windows(slim.conv1(x).relu_(), where)
            gram += inputs.T @ inputs / count
            cross += wanted.T @ inputs / count
        kept[name] = Kept(chosen.channels, refit(gram, cross, chosen.weight))
        statistics[name] = output_statistics(gram, kept[name].weight)
        slim = slim_block(block, kept[name])
        streams = [slim(x) for x in streams]
    return slim_model(dense.model, kept, statistics)
