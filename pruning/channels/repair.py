"""Choice and repair of channels, block by block, on images without labels.

The dense network is run once: it says which channels of each block can go, and what every block
should add up to. A slim network is then repaired in network order: both convolutions of a block are
refitted on what the slim layers before them give, so that they also take back their errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from common.command import cli
from common.images.data import normalize
from common.network.branching import Block, Convolution, FoldedNetwork
from common.network.resnet import BLOCKS, ResNet18
from pruning.channels.slimming import (
    flat_weight,
    slim_block,
    slim_model,
    with_flat_weight,
)
from pruning.channels.surgeon import (
    DAMPING,
    Kept,
    at_positions,
    output_statistics,
    refit,
    remove_channels,
    windows,
)

POSITIONS = 16  # of each map, to speak for it
BATCH_SIZE = 100
# Of a block's first convolution: it lacks nothing, it only meets other inputs.
INNER_DAMPING = 0.2


@dataclass(frozen=True)
class Dense:
    """What the repair needs of the dense network.

    Attributes:
        model: Not changed.
        network: It, folded, in the precision to run in.
        images: uint8, shape (N, 3, 32, 32).
        positions: For each block, int64, shape (N, P).
        inner: For each block, FP32, shape (N, P, C): its inner channels there, before their ReLU.
        targets: For each block, FP32, shape (N, P, O): its sums there, before the last ReLU.
        kept: For each block and width, what is best kept where all else is dense.
    """

    model: ResNet18
    network: FoldedNetwork
    images: torch.Tensor
    positions: Mapping[str, torch.Tensor]
    inner: Mapping[str, torch.Tensor]
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
    positions, inner, targets = ({name: [] for name in BLOCKS} for _ in range(3))
    grams = dict.fromkeys(BLOCKS, 0)
    parts = [*images[:fitted].split(BATCH_SIZE), *images[fitted:].split(BATCH_SIZE)]
    seen = 0
    for batch in cli.progress(parts, "dense network"):
        seen += len(batch)
        x = network.stem(normalize(batch).to(dtype)).relu_()
        for name, block in network.blocks.items():
            hidden = block.conv1(x)
            where = _draw(hidden, generator)
            inner[name].append(at_positions(hidden, where).unflatten(0, where.shape))
            hidden = hidden.relu_()
            residual = block.conv2(hidden)
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
        *(
            {name: torch.cat(found[name]) for name in BLOCKS}
            for found in (positions, inner, targets)
        ),
        {
            name: remove_channels(
                grams.pop(name), flat_weight(exact.blocks[name].conv2), widths[name]
            )
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
    network, exact = dense.network, FoldedNetwork.of(dense.model)
    dtype = network.stem.weight.dtype
    rows = [slice(at, at + BATCH_SIZE) for at in range(0, len(dense.images), BATCH_SIZE)]
    streams = [network.stem(normalize(dense.images[r]).to(dtype)).relu_() for r in rows]
    fitted = {}
    for name, block in cli.progress(network.blocks.items(), "repair"):
        kept = dense.kept[name][widths[name]]
        slim = slim_block(exact.blocks[name], kept)
        positions = [dense.positions[name][r] for r in rows]
        inner = (dense.inner[name][r][..., kept.channels].flatten(0, 1) for r in rows)
        first = _fit(slim.conv1, streams, positions, inner, INNER_DAMPING)
        conv1 = first[0].to(dtype)
        residual = (
            dense.targets[name][r].flatten(0, 1) - at_positions(block.shortcut_of(x), where)
            for r, x, where in zip(rows, streams, positions, strict=True)
        )
        second = _fit(slim.conv2, (conv1(x).relu_() for x in streams), positions, residual)
        fitted |= {f"{name}.conv1": first, f"{name}.conv2": second}
        narrow = Block(conv1, second[0].to(dtype), block.shortcut)
        streams = [narrow(x) for x in streams]
    return slim_model(dense.model, fitted)


def _fit(
    convolution: Convolution,
    inputs: Iterable[torch.Tensor],
    positions: Iterable[torch.Tensor],
    wanted: Iterable[torch.Tensor],
    damping: float = DAMPING,
) -> tuple[Convolution, torch.Tensor, torch.Tensor]:
    """Fit a convolution by least squares, over batches of images.

    Args:
        convolution: To stay near where little is known.
        inputs: That it reads, (N, C, H, W).
        positions: Of its outputs that speak for all, (N, P).
        wanted: That it should give there, (N·P, O).
        damping: How much the convolution weighs.

    Returns:
        The convolution, and mean and variance of what it gives, its bias aside, each (O,).
    """
    gram, cross, count = 0, 0, 0
    for x, where, y in zip(inputs, positions, wanted, strict=True):
        rows = windows(x, where, convolution.stride)
        gram += rows.T @ rows
        cross += y.T @ rows
        count += len(rows)
    gram, cross = gram / count, cross / count
    flat = refit(gram, cross, flat_weight(convolution), damping)
    return with_flat_weight(convolution, flat), *output_statistics(gram, flat)
