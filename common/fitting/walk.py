"""A network on all images, one operation at a time, as the coder and the repair fit its layers."""

import math
from collections.abc import Sequence

import torch

from common.command.cli import log
from common.images.data import ImageSet
from common.network.execution import Layer, Network
from common.network.graph import Graph

MEMORY_BYTES = 4_000_000_000  # memory that the values of all images may take


class Walk:
    """Values of a network for normalised images, which come in batches (n, C, H, W).

    The calls of :meth:`step` follow the ``order`` of a graph that has the network's names. Values
    are kept in the precision ``storage``, while FP32 computes; None keeps them as computed.
    """

    def __init__(
        self, network: Network, images: Sequence[torch.Tensor], order: Graph,
        storage: torch.dtype | None = None,
    ):  # fmt: skip
        self._network, self._storage = network, storage
        self._values: dict[str, list[torch.Tensor | None]] = {network.graph.input: list(images)}
        self._last_use = _last_uses(order)

    def batches(self, name: str) -> list[torch.Tensor]:
        """Return a value in batches, as it is kept."""
        return self._values[name]

    def step(self, name: str, layer: Layer | None = None) -> None:
        """Compute an operation for all images, and free what no later one reads.

        Its inputs were computed before. ``layer`` takes the place of the network's own weights.
        """
        operation = self._network.graph[name]
        sources = [self._values[source] for source in operation.inputs]
        last = [source for source in set(operation.inputs) if self._last_use[source] == name]
        in_place = name in self._network.overwriting
        found: list[torch.Tensor | None] = []
        for index in range(len(sources[0])):
            inputs = [source[index] for source in sources]
            if self._storage is not None:
                inputs = [x.float() for x in inputs]
            value = self._network.compute(operation, inputs, in_place, layer)
            found.append(value if self._storage is None else value.to(self._storage))
            for source in last:
                self._values[source][index] = None
        for source in last:
            del self._values[source]
        self._values[name] = found


def mirrored_pairs(
    images: ImageSet, networks: Sequence[Network], bytes_per_number: int
) -> ImageSet:
    """Return images, each followed by its mirror image, as far as :data:`MEMORY_BYTES` allow.

    So many may walk through the networks at the same time, a number taking so many bytes.
    """
    pairs = images.with_mirrored()
    peak = sum(peak_bytes_per_image(network, bytes_per_number) for network in networks)
    fitting = max(1, min(len(pairs), MEMORY_BYTES // peak))
    if fitting < len(pairs):
        log.info(
            "%d of %d images are used, mirror images among them, to save memory",
            fitting, len(pairs),
        )  # fmt: skip
    return pairs.rows(slice(fitting))


def peak_bytes_per_image(network: Network, bytes_per_number: int) -> int:
    """Return the most memory that a :class:`Walk` takes for an image, in bytes."""
    graph = network.graph
    last_use = _last_uses(graph)
    live: set[str] = set()
    peak = 0
    for operation in graph.operations:
        live.add(operation.name)
        peak = max(peak, sum(math.prod(network.shapes[name]) for name in live))
        live -= {name for name in operation.inputs if last_use[name] == operation.name}
    return peak * bytes_per_number


def _last_uses(graph: Graph) -> dict[str, str]:
    """Return for each value the last operation that reads it."""
    return {name: operation.name for operation in graph.operations for name in operation.inputs}
