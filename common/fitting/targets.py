"""What layers should give: what a dense network gives, at a few places of many images.

The coder and the repair of slim networks both fit one layer after the other to such targets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from common.command import cli
from common.fitting import sampling
from common.fitting.walk import Walk
from common.images.data import ImageSet
from common.network.execution import Network
from common.network.graph import Operation, evaluate

# By layer and batch, positions of its outputs, (n, P); None for a linear layer's.
Positions = Mapping[str, Sequence[torch.Tensor | None]]
# Takes a layer, what it reads, the positions, and how many images came before.
Note = Callable[[Operation, torch.Tensor, torch.Tensor | None, int], None]


@dataclass(frozen=True)
class Targets:
    """Outputs that layers should give, batch by batch."""

    images: ImageSet
    batch_size: int
    positions: Positions
    # By layer and batch, the outputs there, or the sums that the layer completes: (rows, O).
    outputs: Mapping[str, Sequence[torch.Tensor]]
    # Indices (int64) of the outputs that a layer still has, for each that lost some; None for all.
    channels: Mapping[str, torch.Tensor | None] = field(default_factory=dict)

    def walk(
        self, network: Network, dtype: torch.dtype, storage: torch.dtype | None = None
    ) -> Walk:
        """Return a walk of a network through the images, which are given to it in ``dtype``."""
        batches = [images.to(dtype) for images, _ in self.images.batches(self.batch_size)]
        return Walk(network, batches, network.graph, storage)

    def samples(self, network: Network, name: str, walk: Walk) -> Iterator[sampling.Samples]:
        """Yield for each batch what a layer of an FP32 network reads in a walk, and should give."""
        operation, layer = network.graph[name], network.layers[name]
        channels = self.channels.get(name)
        _, operand = sampling.completed_sum(network, name)
        sources = [walk.batches(source) for source in (operation.inputs[0], operand) if source]
        for where, outputs, x, *others in zip(
            self.positions[name], self.outputs[name], *sources, strict=True
        ):
            wanted = outputs.float() if channels is None else outputs[:, channels].float()
            added = sum(sampling.outputs_at(other, where) for other in others)
            rows = sampling.inputs_at(operation, layer, x, where)
            yield sampling.Samples(rows, wanted - added, added)


@torch.no_grad()
def record_targets(
    network: Network, fitted: Network, images: ImageSet, batch_size: int, positions: Positions,
    storage: torch.dtype | None = None, note: Note | None = None,
) -> Targets:  # fmt: skip
    """Run a dense network, and keep what layers give at some positions.

    ``positions`` are those of the layers to fit; ``fitted`` is the network that they will be in,
    for in which order it adds decides which layer completes a sum. The outputs are kept in the
    precision ``storage``, by default as they are. ``note`` is called with each of these layers as
    it runs.
    """
    graph, dtype = network.graph, next(iter(network.layers.values())).weight.dtype
    giving = {sampling.completed_sum(fitted, name)[0]: name for name in positions}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in positions}

    def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
        name, in_place = operation.name, operation.name in network.overwriting
        value = network.compute(operation, inputs, in_place)
        if note is not None and name in positions:
            batch = len(outputs[name])
            note(operation, inputs[0], positions[name][batch], batch * batch_size)
        if (layer := giving.get(name)) is not None:
            places = positions[layer][len(outputs[layer])]
            found = sampling.outputs_at(value, places)
            outputs[layer].append(found.to(storage or value.dtype))
        return value

    for pixels in cli.progress(images.images.split(batch_size), "dense network"):
        given = {graph.input: images.normalize(pixels).to(dtype)}
        evaluate(graph, compute, given, [graph.output])
    return Targets(images, batch_size, positions, outputs)
