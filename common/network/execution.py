"""A network ready to run: a graph, and the weights of its layers with batch norms folded in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.network import graph as kinds
from common.network.graph import Graph, Operation, evaluate
from common.network.shapes import infer_shapes

HAVE_WEIGHTS = (*kinds.WEIGHTED, kinds.AFFINE)
MAY_OVERWRITE = (kinds.ADD, *kinds.ACTIVATIONS)  # their first input, see `may_overwrite`


@dataclass(frozen=True)
class Layer:
    """The weights of a convolution, a linear layer or a channel-wise affine operation.

    Attributes:
        weight: Shape (O, I / groups, height, width), (O, I) or (C,).
        bias: Shape (O,) or (C,).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def masked(self, kept: torch.Tensor) -> Layer:
        """Return the layer without the weights that are not ``kept`` (bool, same shape)."""
        return replace(self, weight=self.weight.masked_fill(~kept, 0))

    def to(self, *args: object, **kwargs: object) -> Layer:
        """Return the layer in another precision or on another device."""
        return Layer(self.weight.to(*args, **kwargs), self.bias.to(*args, **kwargs))


@dataclass(frozen=True)
class Network:
    """A graph with weights, for inference.

    Attributes:
        graph: The operations.
        layers: Weights of the operations that have any, by name.
    """

    graph: Graph
    layers: Mapping[str, Layer]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, H, W) to FP32 logits (N, classes)."""
        output = self.graph.output
        return self.run({self.graph.input: images}, [output])[output].float()

    def run(
        self, given: Mapping[str, torch.Tensor], wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Compute the wanted operations' values from given ones, which are not changed."""
        protected = {*given, *wanted}

        def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
            in_place = operation.name in self.overwriting and operation.inputs[0] not in protected
            return self.compute(operation, inputs, in_place)

        return evaluate(self.graph, compute, given, wanted)

    def compute(
        self,
        operation: Operation,
        inputs: Sequence[torch.Tensor],
        in_place: bool = False,
        layer: Layer | None = None,
    ) -> torch.Tensor:
        """Return an operation's value.

        Args:
            operation: One of the graph's.
            inputs: Values that it reads, the batch dimension first.
            in_place: Whether the first input's memory may be used for the result.
            layer: Weights in place of the network's own.
        """
        run, arguments = _RUN[operation.kind], operation.arguments
        if operation.kind in HAVE_WEIGHTS:
            return run(*inputs, layer or self.layers[operation.name], *arguments)
        if operation.kind in MAY_OVERWRITE:
            return run(*inputs, in_place)
        return run(*inputs, *arguments)

    @functools.cached_property
    def overwriting(self) -> frozenset[str]:
        """The names of the operations that may reuse their first input's memory."""
        return frozenset(
            operation.name
            for operation in self.graph.operations
            if operation.kind in MAY_OVERWRITE
            and self.may_overwrite(operation, operation.inputs[0])
        )

    def may_overwrite(self, operation: Operation, source: str) -> bool:
        """Return whether an input's value is new memory that no other operation reads."""
        is_new = self.graph[source].kind not in (kinds.INPUT, *kinds.VIEWS)
        return is_new and self.graph.users[source] == (operation.name,)

    def to(self, dtype: torch.dtype) -> Network:
        """Return the network with its convolutions in ``dtype``; linear layers stay as they are.

        Values take the precision of the convolution before them; averages over the image and
        logits are FP32.
        """
        return self.with_layers(
            {
                name: layer.to(dtype)
                for name, layer in self.layers.items()
                if self.graph[name].kind != kinds.LINEAR
            }
        )

    def to_device(self, device: torch.device | str) -> Network:
        """Return the network on a device."""
        return self.with_layers({name: layer.to(device) for name, layer in self.layers.items()})

    def with_layers(self, layers: Mapping[str, Layer]) -> Network:
        """Return the network with other weights in some layers."""
        return Network(self.graph, {**self.layers, **layers})

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each operation's value for one image, without the batch dimension."""
        return infer_shapes(self.graph, {name: x.weight.shape for name, x in self.layers.items()})

    @functools.cached_property
    def macs(self) -> Mapping[str, int]:
        """Multiply-accumulates of each layer for one image, weights of zero included."""
        return {
            name: self.layers[name].weight.numel() * math.prod(self.shapes[name][1:])
            for name in self.graph.layers
        }


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
