"""A network ready to run: a graph, and the weights of its layers with batch norms folded in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

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
    VIEWS,
    Graph,
    Operation,
    evaluate,
)
from common.network.shapes import infer_shapes


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
        run = _RUN[operation.kind]
        if operation.kind in (CONVOLUTION, LINEAR, AFFINE):
            return run(operation, *inputs, layer or self.layers[operation.name])
        if operation.kind == ADD or operation.kind in ACTIVATIONS:
            return run(operation, *inputs, in_place)
        return run(operation, *inputs)

    @functools.cached_property
    def overwriting(self) -> frozenset[str]:
        """The names of the operations that may reuse their first input's memory."""
        return frozenset(
            operation.name
            for operation in self.graph.operations
            if operation.kind == ADD or operation.kind in ACTIVATIONS
            if self.may_overwrite(operation, operation.inputs[0])
        )

    def may_overwrite(self, operation: Operation, source: str) -> bool:
        """Return whether an input's value is new memory that no other operation reads."""
        is_new = self.graph[source].kind not in (INPUT, *VIEWS)
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
                if self.graph[name].kind != LINEAR
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
            name: self.layers[name].weight.numel() * _positions(self.shapes[name])
            for name in self.graph.layers
        }


def _positions(shape: tuple[int, ...]) -> int:
    return shape[1] * shape[2] if len(shape) == 3 else 1


# --- how each kind runs ---------------------------------------------------------------------------


def _convolution(operation: Operation, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Run a convolution: ``stride``, ``padding``, ``dilation`` (height, width), ``groups``."""
    settings = operation.attributes
    return F.conv2d(
        x.to(layer.weight.dtype), layer.weight, layer.bias, settings["stride"],
        settings["padding"], settings["dilation"], settings["groups"],
    )  # fmt: skip


def _linear(operation: Operation, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


def _affine(operation: Operation, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Scale and shift each channel: a batch norm that follows no convolution."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(layer.bias.view(shape), x.to(layer.weight.dtype), layer.weight.view(shape))


def _add(operation: Operation, x: torch.Tensor, y: torch.Tensor, in_place: bool) -> torch.Tensor:
    return x.add_(y) if in_place and x.shape == y.shape else x + y


def _multiply(operation: Operation, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply two values, one of which may be one number a channel, in the other's precision."""
    gate, value = sorted((x, y), key=torch.numel)
    return value * gate.to(value.dtype)


def _concatenate(operation: Operation, *values: torch.Tensor) -> torch.Tensor:
    return torch.cat(values, dim=1)


def _max_pool(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Pool: ``kernel``, ``stride``, ``padding``, ``dilation`` (height, width), ``ceil``."""
    settings = operation.attributes
    return F.max_pool2d(
        x, settings["kernel"], settings["stride"], settings["padding"], settings["dilation"],
        settings["ceil"],
    )  # fmt: skip


def _average_pool(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Pool: ``kernel``, ``stride``, ``padding`` (height, width), ``ceil``, ``count_padding``."""
    settings = operation.attributes
    return F.avg_pool2d(
        x, settings["kernel"], settings["stride"], settings["padding"], settings["ceil"],
        settings["count_padding"],
    )  # fmt: skip


def _adaptive_pool(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Pool to ``size`` (height, width)."""
    return F.adaptive_avg_pool2d(x, operation.attributes["size"])


def _global_pool(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Average over the image, in FP32; ``keep`` the two dimensions or not."""
    return x.mean(dim=(2, 3), keepdim=operation.attributes["keep"], dtype=torch.float32)


def _flatten(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def _reshape(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Give the value of each image another ``shape``."""
    return x.reshape(len(x), *operation.attributes["shape"])


def _permute(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Reorder the dimensions, ``order`` of which begins with the batch's, 0."""
    return x.permute(operation.attributes["order"])


def _slice(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Take ``parts``: a list of dimension, start, stop and step."""
    for dimension, start, stop, step in operation.attributes["parts"]:
        index = [slice(None)] * dimension + [slice(start, stop, step)]
        x = x[tuple(index)]
    return x


def _pad(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    """Add zeros around: ``padding`` as of ``torch.nn.functional.pad``, the last dimension first."""
    return F.pad(x, operation.attributes["padding"])


def _activation(
    function: Callable[..., torch.Tensor],
) -> Callable[[Operation, torch.Tensor, bool], torch.Tensor]:
    return lambda operation, x, in_place: function(x, inplace=in_place)


def _sigmoid(operation: Operation, x: torch.Tensor, in_place: bool) -> torch.Tensor:
    return x.sigmoid_() if in_place else x.sigmoid()


_RUN: dict[str, Callable[..., torch.Tensor]] = {
    CONVOLUTION: _convolution,
    LINEAR: _linear,
    AFFINE: _affine,
    ADD: _add,
    MULTIPLY: _multiply,
    CONCATENATE: _concatenate,
    MAX_POOL: _max_pool,
    AVERAGE_POOL: _average_pool,
    ADAPTIVE_POOL: _adaptive_pool,
    GLOBAL_POOL: _global_pool,
    FLATTEN: _flatten,
    RESHAPE: _reshape,
    PERMUTE: _permute,
    SLICE: _slice,
    PAD: _pad,
    "relu": _activation(F.relu),
    "relu6": _activation(F.relu6),
    "hardswish": _activation(F.hardswish),
    "hardsigmoid": _activation(F.hardsigmoid),
    "silu": _activation(F.silu),
    "sigmoid": _sigmoid,
}
