"""The shapes of a network's values, by arithmetic alone.

Running the network on torch's ``meta`` device would tell them too, but imports a symbolic algebra
package, which takes a second of every process that reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.network.graph import (
    ACTIVATIONS,
    ADAPTIVE_POOL,
    ADD,
    AFFINE,
    AVERAGE_POOL,
    CONCATENATE,
    CONVOLUTION,
    FLATTEN,
    GLOBAL_POOL,
    INPUT,
    LINEAR,
    MAX_POOL,
    MULTIPLY,
    PAD,
    PERMUTE,
    RESHAPE,
    SLICE,
    Graph,
)

Shape = tuple[int, ...]
Attributes = Mapping[str, Any]


def infer_shapes(graph: Graph, weights: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Return the shape of each operation's value for one image, without the batch dimension.

    Args:
        graph: The operations.
        weights: Shape of the weight of each layer and affine operation.

    Raises:
        ValueError: An operation cannot run on its inputs.
        TypeError, KeyError: An attribute is missing or of a wrong type.
    """
    shapes: dict[str, Shape] = {}
    for operation in graph.operations:
        inputs = [shapes[name] for name in operation.inputs]
        if operation.kind in (CONVOLUTION, LINEAR, AFFINE):
            inputs.append(tuple(weights[operation.name]))
        shape = _INFER[operation.kind](operation.attributes, *inputs)
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{operation.name[:60]} gives a value of shape {shape}")
        shapes[operation.name] = shape
    return shapes


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def _input(settings: Attributes) -> Shape:
    return tuple(settings["shape"])


def _convolution(settings: Attributes, x: Shape, weight: Shape) -> Shape:
    channels, *size = x
    outputs, per_group, *kernel = weight
    groups = settings["groups"]
    _require(
        len(size) == len(kernel) == 2
        and groups > 0
        and channels == per_group * groups
        and outputs % groups == 0,
        "a convolution's weight does not fit its input",
    )
    return (outputs, *_windows(settings, size, kernel))


def _linear(settings: Attributes, x: Shape, weight: Shape) -> Shape:
    _require(x[-1:] == weight[1:], "a linear layer's weight does not fit its input")
    return (*x[:-1], weight[0])


def _affine(settings: Attributes, x: Shape, weight: Shape) -> Shape:
    _require(x[:1] == weight, "an affine operation's weight does not fit its input")
    return x


def _broadcast(settings: Attributes, *values: Shape) -> Shape:
    rank = max(map(len, values))
    padded = [(1,) * (rank - len(value)) + value for value in values]
    shape = tuple(map(max, zip(*padded, strict=True)))
    for value in padded:
        fits = all(size in (1, wanted) for size, wanted in zip(value, shape, strict=True))
        _require(fits, "values of different shapes meet")
    return shape


def _concatenate(settings: Attributes, *values: Shape) -> Shape:
    _require(len({value[1:] for value in values}) == 1, "values of different shapes meet")
    return (sum(value[0] for value in values), *values[0][1:])


def _pool(settings: Attributes, x: Shape) -> Shape:
    return (x[0], *_windows(settings, x[1:], settings["kernel"]))


def _windows(settings: Attributes, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return how often a window fits into an image, in height and width."""
    found = []
    for n, k, stride, padding, dilation in zip(
        size, kernel, settings["stride"], settings["padding"], settings.get("dilation", (1, 1)),
        strict=True,
    ):  # fmt: skip
        _require(min(k, stride, dilation) > 0 and padding >= 0, "a window that cannot be")
        room = n + 2 * padding - dilation * (k - 1) - 1
        count = (-(-room // stride) if settings.get("ceil") else room // stride) + 1
        if settings.get("ceil") and (count - 1) * stride >= n + padding:
            count -= 1  # the last window would begin in the padding
        found.append(count)
    return found


def _adaptive_pool(settings: Attributes, x: Shape) -> Shape:
    return (x[0], *settings["size"])


def _global_pool(settings: Attributes, x: Shape) -> Shape:
    _require(len(x) == 3, "an average over something that is no image")
    return (x[0], 1, 1) if settings["keep"] else x[:1]


def _flatten(settings: Attributes, x: Shape) -> Shape:
    return (math.prod(x),)


def _reshape(settings: Attributes, x: Shape) -> Shape:
    shape = tuple(settings["shape"])
    _require(math.prod(shape) == math.prod(x), "a value of another size than its new shape")
    return shape


def _permute(settings: Attributes, x: Shape) -> Shape:
    order = settings["order"]
    _require(sorted(order) == list(range(len(x) + 1)) and order[0] == 0, "no order of dimensions")
    return tuple(x[dimension - 1] for dimension in order[1:])


def _slice(settings: Attributes, x: Shape) -> Shape:
    shape = list(x)
    for dimension, start, stop, step in settings["parts"]:
        _require(0 < dimension <= len(x) and step > 0, "a slice that cannot be")
        shape[dimension - 1] = len(range(*slice(start, stop, step).indices(shape[dimension - 1])))
    return tuple(shape)


def _pad(settings: Attributes, x: Shape) -> Shape:
    shape, padding = list(x), settings["padding"]
    _require(len(padding) % 2 == 0 and min(padding) >= 0, "a padding that cannot be")
    for index in range(0, len(padding), 2):
        shape[-1 - index // 2] += padding[index] + padding[index + 1]
    return tuple(shape)


def _same(settings: Attributes, x: Shape) -> Shape:
    return x


_INFER: dict[str, Callable[..., Shape]] = {
    INPUT: _input,
    CONVOLUTION: _convolution,
    LINEAR: _linear,
    AFFINE: _affine,
    ADD: _broadcast,
    MULTIPLY: _broadcast,
    CONCATENATE: _concatenate,
    MAX_POOL: _pool,
    AVERAGE_POOL: _pool,
    ADAPTIVE_POOL: _adaptive_pool,
    GLOBAL_POOL: _global_pool,
    FLATTEN: _flatten,
    RESHAPE: _reshape,
    PERMUTE: _permute,
    SLICE: _slice,
    PAD: _pad,
    **dict.fromkeys(ACTIVATIONS, _same),
}
