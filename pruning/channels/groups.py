"""Channels that can go without touching anything else: from the layers that give them to readers.

A channel of a layer is free if all that depends on it, up to the layers that read it, works on each
channel alone: activations, pooling, channel-wise scaling, depthwise convolutions, flattening, and
multiplication by a gate whose channels go with it. Then it is removed on both sides, and nothing
else in the network changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.network.execution import Network
from common.network.graph import (
    ACTIVATIONS,
    ADAPTIVE_POOL,
    AFFINE,
    AVERAGE_POOL,
    CONVOLUTION,
    FLATTEN,
    GLOBAL_POOL,
    MAX_POOL,
    MULTIPLY,
    PAD,
    RESHAPE,
    Operation,
)
from common.network.regression import MAX_COLUMNS

CHANNELWISE = (
    *ACTIVATIONS, AFFINE, MAX_POOL, AVERAGE_POOL, ADAPTIVE_POOL, GLOBAL_POOL, FLATTEN, MULTIPLY,
)  # fmt: skip


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together, one of each layer that gives them.

    Attributes:
        producers: Names of the layers whose outputs they are, in execution order.
        between: Names of the operations that hold numbers for each channel or depend on how many
            there are: depthwise convolutions, affine operations and reshapes.
        readers: For each layer that reads the channels, how many of its inputs are one channel.
        width: Number of the channels.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    readers: Mapping[str, int]
    width: int

    @property
    def name(self) -> str:
        """The name of the first layer that gives the channels."""
        return self.producers[0]


def find_groups(network: Network) -> dict[str, ChannelGroup]:
    """Return the groups of free channels by name, in execution order."""
    found: dict[str, ChannelGroup] = {}
    taken: set[str] = set()
    for name in network.graph.layers:
        operation = network.graph[name]
        if name not in taken and _groups(operation) == 1:
            group = _Search(network, name).run()
            if group is not None:
                found[group.name] = group
                taken.update(group.producers)
    return found


class _Search:
    """Follows the channels of a layer through the graph, until layers read them."""

    def __init__(self, network: Network, layer: str):
        self._network, self._graph = network, network.graph
        self._width = len(network.layers[layer].bias)
        self._reached = {layer}  # values that have these channels
        self._producers = {layer}
        self._readers: dict[str, int] = {}

    def run(self) -> ChannelGroup | None:
        """Return the group; None where the channels are not free."""
        pending = [*self._producers]
        while pending:
            name = pending.pop()
            if name == self._graph.output:
                return None
            for user in map(self._graph.__getitem__, self._graph.users[name]):
                if user.name in self._reached:
                    continue
                if user.is_layer and not self._is_depthwise(user):
                    if not self._note_reader(user, name):
                        return None
                elif self._passes(user):
                    for gate in self._gates_of(user):
                        if gate is None:
                            return None
                        pending += gate
                    self._reached.add(user.name)
                    pending.append(user.name)
                else:
                    return None
        return self._group()

    def _group(self) -> ChannelGroup | None:
        if not self._readers or self._producers & self._readers.keys():
            return None
        order = [operation.name for operation in self._graph.operations]
        between = [
            name
            for name in order
            if name in self._reached - self._producers
            and (self._graph[name].is_layer or self._graph[name].kind in (AFFINE, RESHAPE))
        ]
        return ChannelGroup(
            tuple(name for name in order if name in self._producers),
            tuple(between),
            {name: self._readers[name] for name in order if name in self._readers},
            self._width,
        )

    def _note_reader(self, user: Operation, source: str) -> bool:
        weight = self._network.layers[user.name].weight
        if _groups(user) != 1 or weight[0].numel() > MAX_COLUMNS:
            return False
        self._readers[user.name] = weight.shape[1] // self._width
        return True

    def _passes(self, user: Operation) -> bool:
        """Return whether an operation works on each channel alone."""
        if user.kind == PAD:
            return len(user.attributes["padding"]) <= 4
        if user.kind == RESHAPE:
            return user.attributes["shape"][0] == self._width
        return user.kind in CHANNELWISE or self._is_depthwise(user)

    def _gates_of(self, user: Operation) -> list[list[str] | None]:
        """Return for each other factor of a multiplication the values to follow from there.

        None where it does not come from a layer by operations on each channel alone.
        """
        if user.kind != MULTIPLY:
            return []
        return [self._trace_back(name) for name in user.inputs if name not in self._reached]

    def _trace_back(self, name: str) -> list[str] | None:
        chain: list[str] = []
        while name not in self._reached:
            operation = self._graph[name]
            chain.append(name)
            if operation.is_layer and not self._is_depthwise(operation):
                width = len(self._network.layers[name].bias)
                if _groups(operation) != 1 or width != self._width:
                    return None
                self._producers.add(name)
                break
            if not self._passes(operation) or len(operation.inputs) != 1:
                return None
            name = operation.inputs[0]
        self._reached.update(chain)
        return chain

    def _is_depthwise(self, operation: Operation) -> bool:
        if operation.kind != CONVOLUTION:
            return False
        outputs = len(self._network.layers[operation.name].bias)
        return operation.attributes["groups"] == outputs == self._width > 1


def _groups(operation: Operation) -> int:
    return operation.attributes.get("groups", 1)
