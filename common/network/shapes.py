"""The shapes of a network's values, by arithmetic alone.

Running the network on torch's ``meta`` device would tell them too, but imports a symbolic algebra
package, which takes a second of every process that reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from common.network import graph as kinds
from common.network.graph import Graph

Shape = tuple[int, ...]


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
        if operation.kind in (*kinds.WEIGHTED, kinds.AFFINE):
            inputs.append(tuple(weights[operation.name]))
        shape = tuple(_INFER[operation.kind](*inputs, *operation.arguments))
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{operation.name[:60]} gives a value of shape {shape}")
        shapes[operation.name] = shape
    return shapes


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def _convolution(x: Shape, weight: Shape, stride, padding, dilation, groups: int) -> Shape:
    channels, *size = x
    outputs, per_group, *kernel = weight
    _require(
        len(size) == len(kernel) == 2
        and groups > 0
        and channels == per_group * groups
        and outputs % groups == 0,
        "a convolution's weight does not fit its input",
    )
    return (outputs, *_windows(size, kernel, stride, padding, dilation))


def _linear(x: Shape, weight: Shape) -> Shape:
    _require(x[-1:] == weight[1:], "a linear layer's weight does not fit its input")
    return (*x[:-1], weight[0])


def _affine(x: Shape, weight: Shape) -> Shape:
    _require(x[:1] == weight, "an affine operation's weight does not fit its input")
    return x


def _broadcast(*values: Shape) -> Shape:
    rank = max(map(len, values))
    padded = [(1,) * (rank - len(value)) + value for value in values]
    shape = tuple(map(max, zip(*padded, strict=True)))
    for value in padded:
        fits = all(size in (1, wanted) for size, wanted in zip(value, shape, strict=True))
        _require(fits, "values of different shapes meet")
    return shape


def _concatenate(*values: Shape) -> Shape:
    _require(len({value[1:] for value in values}) == 1, "values of different shapes meet")
    return (sum(value[0] for value in values), *values[0][1:])


def _max_pool(x: Shape, kernel, stride, padding, dilation, ceil: bool) -> Shape:
    return (x[0], *_windows(x[1:], kernel, stride, padding, dilation, ceil))


def _average_pool(x: Shape, kernel, stride, padding, ceil: bool, count_padding: bool) -> Shape:
    return _max_pool(x, kernel, stride, padding, (1, 1), ceil)


def _windows(size, kernel, strides, paddings, dilations, ceil: bool = False) -> list[int]:
    """Return how often a window fits into an image; all arguments are for height and width."""
    found = []
    for n, k, stride, padding, dilation in zip(
        size, kernel, strides, paddings, dilations, strict=True
    ):
        _require(min(k, stride, dilation) > 0 and padding >= 0, "a window that cannot be")
        room = n + 2 * padding - dilation * (k - 1) - 1
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= n + padding:
            count -= 1  # the last window would begin in the padding
        found.append(count)
    return found


def _global_pool(x: Shape, keep: bool) -> Shape:
    _require(len(x) == 3, "an average over something that is no image")
    return (x[0], 1, 1) if keep else x[:1]


def _reshape(x: Shape, shape: Sequence[int]) -> Sequence[int]:
    _require(math.prod(shape) == math.prod(x), "a value of another size than its new shape")
    return shape


def _permute(x: Shape, order: Sequence[int]) -> Shape:
    _require(sorted(order) == list(range(len(x) + 1)) and order[0] == 0, "no order of dimensions")
    return tuple(x[dimension - 1] for dimension in order[1:])


def _slice(x: Shape, parts: Sequence[Sequence[int]]) -> list[int]:
    shape = list(x)
    for dimension, start, stop, step in parts:
        _require(0 < dimension <= len(x) and step > 0, "a slice that cannot be")
        shape[dimension - 1] = len(range(*slice(start, stop, step).indices(shape[dimension - 1])))
    return shape


def _pad(x: Shape, padding: Sequence[int]) -> list[int]:
    _require(len(padding) % 2 == 0 and min(padding) >= 0, "a padding that cannot be")
    shape = list(x)
    for index in range(0, len(padding), 2):
        shape[-1 - index // 2] += padding[index] + padding[index + 1]
    return shape


# Functions of the inputs' shapes, then the weight's, then the attributes.
_INFER: dict[str, Callable[..., Sequence[int]]] = {
    kinds.INPUT: lambda shape: shape,
    kinds.CONVOLUTION: _convolution,
    kinds.LINEAR: _linear,
    kinds.AFFINE: _affine,
    **dict.fromkeys((kinds.ADD, kinds.MULTIPLY), _broadcast),
    kinds.CONCATENATE: _concatenate,
    kinds.MAX_POOL: _max_pool,
    kinds.AVERAGE_POOL: _average_pool,
    kinds.ADAPTIVE_POOL: lambda x, size: (x[0], *size),
    kinds.GLOBAL_POOL: _global_pool,
    kinds.FLATTEN: lambda x: (math.prod(x),),
    kinds.RESHAPE: _reshape,
    kinds.PERMUTE: _permute,
    kinds.SLICE: _slice,
    kinds.PAD: _pad,
    **dict.fromkeys(kinds.ACTIVATIONS, lambda x: x),
}
