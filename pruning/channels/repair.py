"""Choice and repair of channels, group by group, on images without labels.

The dense network is run once: it says which channels of each group can go, and what every layer
should give. A slim network is then repaired in execution order: the layers that give and that read
channels are refitted on what the slim layers before them give, so that they also take back the
errors of those.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from common.command import cli
from common.fitting import regression, sampling
from common.fitting.targets import Targets, record_targets
from common.images.data import ImageSet
from common.network.execution import Network
from common.network.graph import Operation
from common.network.tracing import Traced
from pruning.channels.groups import ChannelGroup
from pruning.channels.slimming import channels_given, slim_module, slim_network
from pruning.channels.surgeon import DAMPING, ChannelChoice, Reader, remove_channels

POSITIONS = 16  # positions of each image's outputs that are looked at
BATCH_SIZE = 100
# Ridge of a layer that lacks no inputs but only meets others than before.
INNER_DAMPING = 0.2


@dataclass(frozen=True)
class Dense:
    """What the repair needs of the dense network."""

    model: nn.Module  # the module; not changed
    traced: Traced  # its network, in FP32
    network: Network  # the network in the precision to run in
    groups: Mapping[str, ChannelGroup]  # the groups of channels
    targets: Targets  # what each layer to refit gives, in that precision
    # For each group and width the channels to keep where all else is dense.
    choices: Mapping[str, Mapping[int, ChannelChoice]]


@torch.no_grad()
def measure_dense(
    model: nn.Module, traced: Traced, groups: Mapping[str, ChannelGroup], images: ImageSet,
    widths: Mapping[str, Iterable[int]], seed: int, dtype: torch.dtype,
    fitted: int | None = None, positions: int = POSITIONS,
) -> Dense:  # fmt: skip
    """Run the dense network, and find what to keep of each group at every one of its ``widths``.

    The module is in eval mode; the training images are on its device, and the first ``fitted`` of
    them, or all, say what to keep. ``dtype`` is the precision to run in. Each image's
    outputs are sampled at ``positions`` places, which ``seed`` draws.
    """
    fitted = len(images) if fitted is None else fitted
    exact, network = traced.network, traced.network.to(dtype)
    readers = [name for group in groups.values() for name in group.readers]
    sums = {name: regression.MomentSums(exact.layers[name], 1) for name in readers}

    def note(
        operation: Operation, x: torch.Tensor, where: torch.Tensor | None, before: int
    ) -> None:
        count = max(fitted - before, 0)
        if operation.name in sums and count:
            where = None if where is None else where[:count]
            rows = sampling.inputs_at(operation, exact.layers[operation.name], x[:count], where)
            sums[operation.name].add(rows)

    places = _draw_positions(exact, groups, images, positions, seed)
    targets = record_targets(network, exact, images, BATCH_SIZE, places, note=note)
    choices = {}
    for name, group in cli.progress(groups.items(), "choose channels"):
        moments = {reader: sums.pop(reader).moments() for reader in group.readers}
        started = {
            n: Reader.start(exact.layers[n], found, group.width) for n, found in moments.items()
        }
        choices[name] = remove_channels(started, widths[name])
    return Dense(model, traced, network, groups, targets, choices)


def _draw_positions(
    network: Network, groups: Mapping[str, ChannelGroup], images: ImageSet, count: int, seed: int
) -> dict[str, list[torch.Tensor | None]]:
    """Draw positions for the layers that change with a group's width, batch by batch.

    Layers of one group share them where their outputs are of one size.
    """
    shapes, same_as = network.shapes, {}
    for group in groups.values():
        size = shapes[group.name][1:]
        others = (*group.between, *group.readers)
        same_as |= {name: group.name for name in others if shapes[name][1:] == size}
    touched = {name for group in groups.values() for name in group.touched}
    positions = {name: [] for name in network.graph.layers if name in touched}
    generator = torch.Generator().manual_seed(seed)
    for batch in images.images.split(BATCH_SIZE):
        for name, places in positions.items():
            if name in same_as:
                places.append(positions[same_as[name]][-1])
                continue
            drawn = sampling.draw_positions((len(batch), *shapes[name]), count, generator)
            places.append(None if drawn is None else drawn.to(batch.device))
    return positions


@torch.no_grad()
def repair(dense: Dense, widths: Mapping[str, int]) -> nn.Module:
    """Return a module of these widths in eval mode, refitted to what the dense network gives."""
    choices = {name: dense.choices[name][width] for name, width in widths.items()}
    exact = slim_network(dense.traced.network, dense.groups, choices)
    channels = channels_given(dense.groups, choices)
    dtype = next(iter(dense.network.layers.values())).weight.dtype
    slim = slim_network(dense.network, dense.groups, choices)
    targets = replace(dense.targets, channels=channels)
    walk = targets.walk(slim, dtype)
    narrow = (g for name, g in dense.groups.items() if widths.get(name, g.width) < g.width)
    lacking = {reader for group in narrow for reader in group.readers}
    layers, statistics = {}, {}
    for operation in cli.progress(slim.graph.operations[1:], "repair"):
        name, replaced = operation.name, None
        if name in targets.outputs:
            damping = DAMPING if name in lacking else INNER_DAMPING
            moments = regression.measure_moments(
                exact.layers[name],
                operation.attributes.get("groups", 1),
                partial(targets.samples, exact, name, walk),
                lambda moments, damping=damping: damping * moments.squares,
                sampling.active_range(exact, name),
            )
            layers[name] = moments.refit(exact.layers[name], damping * moments.squares)
            statistics[name] = moments.output_statistics(layers[name].weight)
            replaced = layers[name].to(slim.layers[name].weight.dtype)
        walk.step(name, replaced)
    network = exact.with_layers(layers)
    return slim_module(dense.model, dense.traced, network, channels, statistics)
