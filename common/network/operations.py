"""How each kind of operation runs in torch, and which shape its value has."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.network import graph as kinds
from common.network.graph import Graph, Operation

HAVE_WEIGHTS = (*kinds.WEIGHTED, kinds.AFFINE)
MAY_OVERWRITE = (kinds.ADD, *kinds.ACTIVATIONS)  # may compute in their first input's memory


@dataclass(frozen=True)
class Layer:
    """The weights of a convolution, a linear layer or a channel-wise affine operation."""

    weight: torch.Tensor  # (O, I / groups, height, width), (O, I) or (C,)
    bias: torch.Tensor  # (O,) or (C,)

    def masked(self, kept: torch.Tensor) -> "Layer":
        """Return the layer without the weights that are not ``kept`` (bool, same shape)."""
        return replace(self, weight=self.weight.masked_fill(~kept, 0))

    def to(self, *args: object, **kwargs: object) -> "Layer":
        """Return the layer in another precision or on another device."""
        return Layer(self.weight.to(*args, **kwargs), self.bias.to(*args, **kwargs))

    def laid_out(self) -> "Layer":
        """Return the layer as convolutions prefer it, with its weight channels_last."""
        if self.weight.ndim != 4:
            return self
        return replace(self, weight=self.weight.contiguous(memory_format=torch.channels_last))


def compute(
    operation: Operation, inputs: Sequence[torch.Tensor], layer: Layer | None, in_place: bool
) -> torch.Tensor:
    """Return the value of any operation but the input; ``layer`` holds its weights, if it has any.

    With ``in_place``, the first input's memory may be used for the result.
    """
    run = _RUN[operation.kind]
    if operation.kind in HAVE_WEIGHTS:
        return run(*inputs, layer, *operation.arguments)
    if operation.kind in MAY_OVERWRITE:
        return run(*inputs, in_place)
    return run(*inputs, *operation.arguments)


def infer_shapes(graph: Graph, weights: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each operation's value for one image, without the batch dimension.

    It runs on a batch of no images, for ``meta`` takes a second to import. ``weights`` holds
    the shape of each weight. An operation that cannot run is a ValueError; an attribute that is
    missing or of a wrong type is a KeyError or a TypeError.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for operation in graph.operations:
        name = operation.name
        inputs = [torch.empty(0, *shapes[source]) for source in operation.inputs]
        try:
            shape = _infer(operation, inputs, weights.get(name)).shape
        except (RuntimeError, IndexError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{name[:60]} cannot be computed: {reason}") from None
        if shape[0] != 0 or 0 in shape[1:]:
            raise ValueError(f"{name[:60]} gives a value of shape {tuple(shape[1:])}")
        shapes[name] = tuple(shape[1:])
    return shapes


def _infer(
    operation: Operation, inputs: Sequence[torch.Tensor], weight_shape: Sequence[int] | None
) -> torch.Tensor:
    """Return an operation's value for no images; torch alone would take some wrong attributes."""
    kind, attributes, layer = operation.kind, operation.attributes, None
    if kind == kinds.INPUT:
        return torch.empty(0, *attributes["shape"])
    if kind == kinds.RESHAPE and math.prod(attributes["shape"]) != inputs[0].shape[1:].numel():
        raise ValueError("a value of another size than its new shape")
    if kind == kinds.SLICE and any(dimension < 1 for dimension, *_ in attributes["parts"]):
        raise ValueError("a slice of the batch")
    if kind in (kinds.CONVOLUTION, kinds.MAX_POOL) and min(attributes["dilation"]) < 1:
        raise ValueError("a dilation below 1")
    if kind in HAVE_WEIGHTS:
        blank = torch.empty(1)  # expanded, so that weights take no memory
        layer = Layer(blank.expand(*weight_shape), blank.expand(weight_shape[0]))
        if kind == kinds.AFFINE and inputs[0].shape[1:2] != tuple(weight_shape):
            raise ValueError("an affine operation's weight does not fit its input")
    return compute(operation, inputs, layer, in_place=False)


# --- how each kind runs ---------------------------------------------------------------------------


def _affine(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Scale and shift each channel: a batch norm that follows no convolution."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(layer.bias.view(shape), x.to(layer.weight.dtype), layer.weight.view(shape))


def _add(x: torch.Tensor, y: torch.Tensor, in_place: bool) -> torch.Tensor:
    return x.add_(y) if in_place and x.shape == y.shape else x + y


def _multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply two values, one of which may be one number a channel, in the other's precision."""
    gate, value = sorted((x, y), key=torch.numel)
    return value * gate.to(value.dtype)


def _slice(x: torch.Tensor, parts: Sequence[Sequence[int]]) -> torch.Tensor:
    for dimension, start, stop, step in parts:
        x = x[(*[slice(None)] * dimension, slice(start, stop, step))]
    return x


def _in_own_precision(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, layer: Layer, *arguments: object) -> torch.Tensor:
        return function(x.to(layer.weight.dtype), layer.weight, layer.bias, *arguments)

    return run


# Functions of the inputs, then the layer or whether to work in place, then the attributes.
_RUN: dict[str, Callable[..., torch.Tensor]] = {
    kinds.CONVOLUTION: _in_own_precision(F.conv2d),
    kinds.LINEAR: _in_own_precision(F.linear),
    kinds.AFFINE: _affine,
    kinds.ADD: _add,
    kinds.MULTIPLY: _multiply,
    kinds.CONCATENATE: lambda *values: torch.cat(values, dim=1),
    kinds.MAX_POOL: F.max_pool2d,
    kinds.AVERAGE_POOL: F.avg_pool2d,
    kinds.ADAPTIVE_POOL: F.adaptive_avg_pool2d,
    kinds.GLOBAL_POOL: lambda x, keep: x.mean((2, 3), keepdim=keep, dtype=torch.float32),
    kinds.FLATTEN: lambda x: x.flatten(1),
    kinds.RESHAPE: lambda x, shape: x.reshape(len(x), *shape),
    kinds.PERMUTE: torch.permute,
    kinds.SLICE: _slice,
    kinds.PAD: F.pad,
    **{kind: getattr(F, kind) for kind in ("relu", "relu6", "hardswish", "hardsigmoid", "silu")},
    "sigmoid": lambda x, in_place: x.sigmoid_() if in_place else x.sigmoid(),
}
