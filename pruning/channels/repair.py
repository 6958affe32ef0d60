"""Choice and repair of channels, group by group, on images without labels.

The dense network is run once: it says which channels of each group can go, and what every layer
should give. A slim network is then repaired in execution order: the layers that give and that read
channels are refitted on what the slim layers before them give, so that they also take back the
errors of those.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from common.command import cli
from common.images.data import ImageSet
from common.network import regression, sampling
from common.network.execution import Network
from common.network.graph import Operation, evaluate
from common.network.tracing import Traced
from common.network.walk import Walk
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
    images: ImageSet  # training images
    # For each layer to refit the positions of its outputs that are looked at, (N, P); nothing for
    # linear layers.
    positions: Mapping[str, torch.Tensor]
    # For each of these layers what it gives there, or the sum that it completes, (N, P, O) or
    # (N, O), in the network's precision.
    targets: Mapping[str, torch.Tensor]
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
    network, layers = traced.network.to(dtype), traced.network.layers
    recorder = _Recorder(traced.network, network, groups, positions, seed)
    for is_fitted, part in ((True, images.images[:fitted]), (False, images.images[fitted:])):
        for batch in cli.progress(part.split(BATCH_SIZE), "dense network") if len(part) else ():
            recorder.run(images.normalize(batch).to(dtype), is_fitted)
    choices = {}
    for name, group in cli.progress(groups.items(), "choose channels"):
        moments = {reader: recorder.sums.pop(reader).moments() for reader in group.readers}
        readers = {n: Reader.start(layers[n], found, group.width) for n, found in moments.items()}
        choices[name] = remove_channels(readers, widths[name])
    positions, targets = (
        {name: torch.cat(found) for name, found in values.items()}
        for values in (recorder.positions, recorder.targets)
    )
    return Dense(model, traced, network, groups, images, positions, targets, choices)


class _Recorder:
    """Runs the dense network batch by batch, and notes what its layers read and give."""

    def __init__(
        self, exact: Network, network: Network, groups: Mapping[str, ChannelGroup], count: int,
        seed: int,
    ):  # fmt: skip
        self._exact, self._network, self._count = exact, network, count
        touched = (name for group in groups.values() for name in group.touched)
        self._layers = {name for name in touched if exact.graph[name].is_layer}
        self._generator = torch.Generator().manual_seed(seed)
        readers = [name for group in groups.values() for name in group.readers]
        self.sums = {name: regression.MomentSums(exact.layers[name], 1) for name in readers}
        self.positions: dict[str, list[torch.Tensor]] = {}
        self.targets: dict[str, list[torch.Tensor]] = {name: [] for name in self._layers}
        # A layer that completes a sum is looked at where the sum is known.
        self._sums_of = {sampling.completed_sum(exact, name)[0]: name for name in self._layers}
        # Layers of one group share their positions where their outputs are of one size.
        self._same_as: dict[str, str] = {}
        for group in groups.values():
            for name in (*group.between, *group.readers):
                if exact.shapes[name][1:] == exact.shapes[group.name][1:]:
                    self._same_as[name] = group.name

    def run(self, images: torch.Tensor, is_fitted: bool) -> None:
        """Run a batch; note what readers read only where the batch ``is_fitted``."""
        graph, places = self._network.graph, {}

        def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
            in_place = operation.name in self._network.overwriting
            name, first = operation.name, inputs[0]
            value = self._network.compute(operation, inputs, in_place)
            if name in self._layers:
                if (same := self._same_as.get(name)) in places:
                    places[name] = places[same]
                else:
                    drawn = sampling.draw_positions(value.shape, self._count, self._generator)
                    places[name] = None if drawn is None else drawn.to(value.device)
                if places[name] is not None:
                    self.positions.setdefault(name, []).append(places[name])
                if is_fitted and name in self.sums:
                    layer = self._exact.layers[name]
                    self.sums[name].add(sampling.inputs_at(operation, layer, first, places[name]))
            if name in self._sums_of:
                layer = self._sums_of[name]
                found = sampling.outputs_at(value, places[layer])
                found = found.unflatten(0, (len(value), -1)).to(value.dtype)  # bf16 takes half
                self.targets[layer].append(found)
            return value

        evaluate(graph, compute, {graph.input: images}, [graph.output])


@torch.no_grad()
def repair(dense: Dense, widths: Mapping[str, int]) -> nn.Module:
    """Return a module of these widths in eval mode, refitted to what the dense network gives."""
    choices = {name: dense.choices[name][width] for name, width in widths.items()}
    exact = slim_network(dense.traced.network, dense.groups, choices)
    channels = channels_given(dense.groups, choices)
    dtype = next(iter(dense.network.layers.values())).weight.dtype
    pixels = dense.images.images.split(BATCH_SIZE)
    images = [dense.images.normalize(batch).to(dtype) for batch in pixels]
    slim = slim_network(dense.network, dense.groups, choices)
    walk = Walk(slim, images, slim.graph)
    narrow = (g for name, g in dense.groups.items() if widths.get(name, g.width) < g.width)
    lacking = {reader for group in narrow for reader in group.readers}
    layers, statistics = {}, {}
    for operation in cli.progress(slim.graph.operations[1:], "repair"):
        name, replaced = operation.name, None
        if name in dense.targets:
            damping = DAMPING if name in lacking else INNER_DAMPING
            moments = regression.measure_moments(
                exact.layers[name],
                operation.attributes.get("groups", 1),
                partial(_samples, dense, operation, exact, walk, channels.get(name)),
                lambda moments, damping=damping: damping * moments.squares,
                sampling.active_range(exact, name),
            )
            layers[name] = moments.refit(exact.layers[name], damping * moments.squares)
            statistics[name] = moments.output_statistics(layers[name].weight)
            replaced = layers[name].to(slim.layers[name].weight.dtype)
        walk.step(name, replaced)
    network = exact.with_layers(layers)
    return slim_module(dense.model, dense.traced, network, channels, statistics)


def _samples(
    dense: Dense, operation: Operation, exact: Network, walk: Walk, channels: torch.Tensor | None
) -> Iterable[sampling.Samples]:
    """Yield what a slim layer reads, and what it should give."""
    name, start = operation.name, 0
    _, operand = sampling.completed_sum(exact, name)
    others = walk.batches(operand) if operand else None
    for index, x in enumerate(walk.batches(operation.inputs[0])):
        batch = slice(start, start + len(x))
        start += len(x)
        positions = dense.positions[name][batch] if name in dense.positions else None
        wanted = dense.targets[name][batch].flatten(0, 1).float()
        if channels is not None:
            wanted = wanted[:, channels]
        added = 0.0 if others is None else sampling.outputs_at(others[index], positions)
        rows = sampling.inputs_at(operation, exact.layers[name], x, positions)
        yield sampling.Samples(rows, wanted - added, added)
