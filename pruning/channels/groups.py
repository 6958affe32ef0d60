"""Channels that can go together: from the layers that give them to the layers that read them.

Operations that work on each channel alone pass channels on. Additions and multiplications tie the
channels of their operands together, so the layers of a residual stream, or a layer and its gate,
lose the same channels. Where all that reads the channels are such operations or layers, a channel
is removed on all sides, and nothing else in the network changes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from common.fitting.regression import MAX_COLUMNS
from common.network import graph as kinds
from common.network.execution import Network

CHANNELWISE = (*kinds.ACTIVATIONS, *kinds.POOLS, kinds.AFFINE, kinds.FLATTEN)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together, one of each layer that gives them."""

    producers: tuple[str, ...]  # names of the layers whose outputs they are, in execution order
    # Names of the operations that hold numbers for each channel or depend on how many there are:
    # depthwise convolutions, affine operations and reshapes.
    between: tuple[str, ...]
    # For each layer that reads the channels, how many of its inputs are one channel.
    readers: Mapping[str, int]
    width: int  # number of the channels

    @property
    def name(self) -> str:
        """The name of the first layer that gives the channels."""
        return self.producers[0]

    @property
    def touched(self) -> tuple[str, ...]:
        """The operations that change if the width does."""
        return (*self.producers, *self.between, *self.readers)


def find_groups(network: Network) -> dict[str, ChannelGroup]:
    """Return the groups of channels that can be removed by name, in execution order."""
    groups = [_as_group(network, values) for values in _values_with_same_channels(network)]
    return {group.name: group for group in groups if group is not None}


def _values_with_same_channels(network: Network) -> list[set[str]]:
    """Return the values, as sets of those that have the same channels, in execution order."""
    sets: dict[str, set[str]] = {}
    for operation in network.graph.operations:
        joined = {operation.name}
        if _passes_channels_on(network, operation):
            joined = joined.union(*(sets[name] for name in operation.inputs))
        sets |= dict.fromkeys(joined, joined)
    return list({id(values): values for values in sets.values()}.values())


def _passes_channels_on(network: Network, operation: kinds.Operation) -> bool:
    """Return whether an operation's values have the channels of its inputs."""
    if operation.kind == kinds.PAD:
        return len(operation.attributes["padding"]) <= 4  # height and width
    if operation.kind in (kinds.ADD, kinds.MULTIPLY, kinds.RESHAPE):
        shapes = network.shapes
        return all(shapes[name][0] == shapes[operation.name][0] for name in operation.inputs)
    return operation.kind in CHANNELWISE or _is_depthwise(network, operation)


def _as_group(network: Network, values: Collection[str]) -> ChannelGroup | None:
    """Return the group of the channels of some values; None where these cannot be removed."""
    graph = network.graph
    own = [operation for operation in graph.operations if operation.name in values]
    passing = {operation.name for operation in own if _passes_channels_on(network, operation)}
    producers = [operation for operation in own if operation.name not in passing]
    if graph.output in values or not all(map(_is_dense, producers)):
        return None
    widths = {len(network.layers[operation.name].bias) for operation in producers}
    sized = (o for o in own if o.name in network.layers or o.kind == kinds.RESHAPE)
    between = [operation for operation in sized if operation.name in passing]
    widths |= {network.shapes[operation.name][0] for operation in between}
    users = {user for name in values for user in graph.users[name]} - passing
    readers = [operation for operation in graph.operations if operation.name in users]
    if len(widths) > 1 or not readers or not all(map(_is_dense, readers)):
        return None
    if any(network.layers[reader.name].weight[0].numel() > MAX_COLUMNS for reader in readers):
        return None  # regression on so many inputs takes too much memory
    (width,) = widths
    return ChannelGroup(
        tuple(operation.name for operation in producers),
        tuple(operation.name for operation in between),
        {user.name: network.layers[user.name].weight.shape[1] // width for user in readers},
        width,
    )


def _is_dense(operation: kinds.Operation) -> bool:
    """Return whether an operation is a layer in which each output depends on all inputs."""
    return operation.is_layer and operation.attributes.get("groups", 1) == 1


def _is_depthwise(network: Network, operation: kinds.Operation) -> bool:
    if operation.kind != kinds.CONVOLUTION:
        return False
    weight = network.layers[operation.name].weight
    return operation.attributes["groups"] == len(weight) > 1 and weight.shape[1] == 1
