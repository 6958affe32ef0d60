"""The walk behind the scan: a network once, and every variant of it branching off.

A variant is the network with one layer replaced. Running each variant from the start repeats all
operations before that layer. Here each batch runs through the dense network once, and a variant
starts at its replaced layer. All variants that have started are stacked along the batch dimension,
so that the operations they share run once for all of them, on batches large enough for full speed.
For the 21 layers of ResNet18 that is 6.0 instead of 11.7 billion multiply-adds an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.network.execution import Layer, Network
from common.network.graph import ACTIVATIONS, ADD, Graph, Operation, evaluate
from common.network.resnet import BLOCKS, ResNet18, fold_weights, prunable_layers

# What a layer becomes: other weights, or a function of its input that returns new memory.
Variant = Layer | Callable[[torch.Tensor], torch.Tensor]
Rows = torch.Tensor | slice
ALL_ROWS = slice(None)


def start_values(graph: Graph, layers: Collection[str]) -> list[str]:
    """Return the operations whose dense values the variants need: at their start, and at joins.

    A variant that reaches only one operand of an addition takes the other from the dense network.
    """
    carried: dict[str, set[str]] = {}  # the variants that change each operation's value
    needed: dict[str, None] = {}
    for operation in graph.operations:
        together = set().union(*(carried[name] for name in operation.inputs))
        needed |= dict.fromkeys(name for name in operation.inputs if carried[name] != together)
        if operation.name in layers:
            together.add(operation.name)
            needed |= dict.fromkeys(operation.inputs)
        carried[operation.name] = together
    return list(needed)


def branch_logits(
    network: Network,
    dense: Mapping[str, torch.Tensor],
    variants: Mapping[str, Variant],
    rows: Mapping[str, Rows] | None = None,
) -> torch.Tensor:
    """Return the logits of every variant, one after the other in the order of ``variants``.

    Args:
        network: The dense network, in the precision to run the variants in.
        dense: Values of the operations in :func:`start_values`, in any precision; not changed.
        variants: For each layer, what replaces it, in the network's precision.
        rows: For each layer, the images of the batch to run its variant on; all by default.

    Returns:
        FP32, shape (rows of all variants together, classes).
    """
    walk = _Walk(network, dense, variants, rows or dict.fromkeys(variants, ALL_ROWS))
    graph = network.graph
    found = evaluate(graph, walk.compute, {graph.input: []}, [graph.output])[graph.output]
    return torch.cat(list(walk.pieces(found, list(variants), graph.output))).float()


# The values of several variants: tensors, each with the layers that its variants replace, one
# variant's rows after the other's. Joined into one tensor only where an operation needs that.
_Stack = list[tuple[list[str], torch.Tensor]]


@dataclass(frozen=True)
class _Walk:
    """The arguments of :func:`branch_logits`."""

    network: Network
    dense: Mapping[str, torch.Tensor]
    variants: Mapping[str, Variant]
    rows: Mapping[str, Rows]

    def compute(self, operation: Operation, inputs: Sequence[_Stack]) -> _Stack:
        """Run an operation for the variants that have started, and start one if it is its layer."""
        if not any(inputs):
            found = []
        elif operation.kind == ADD and (ordered := self._to_add_in_place(operation, inputs)):
            found = self._add(*ordered)
        elif operation.kind in ACTIVATIONS:
            in_place = operation.name in self.network.overwriting
            found = [
                (layers, self.network.compute(operation, [x], in_place)) for layers, x in inputs[0]
            ]
        else:
            found = [self._run_joined(operation, inputs)]
        if operation.name in self.variants:
            found.append(([operation.name], self._start(operation)))
        return found

    def pieces(self, stack: _Stack, layers: Sequence[str], name: str) -> Iterator[torch.Tensor]:
        """Yield a value in the order of ``layers``; variants that it lacks take the dense one."""
        places = {}
        for held, tensor in stack:
            ends = itertools.accumulate(map(self._count, held), initial=0)
            places |= {
                layer: (tensor, *place)
                for layer, place in zip(held, itertools.pairwise(ends), strict=True)
            }
        runs = []  # neighbours in a tensor are one piece
        for layer in layers:
            if layer not in places:
                runs.append((self.dense[name][self.rows[layer]], None, None))
                continue
            tensor, start, stop = places[layer]
            if runs and runs[-1][0] is tensor and runs[-1][2] == start:
                start = runs.pop()[1]
            runs.append((tensor, start, stop))
        for tensor, start, stop in runs:
            yield tensor[start:stop]

    def _run_joined(
        self, operation: Operation, inputs: Sequence[_Stack]
    ) -> tuple[list[str], torch.Tensor]:
        carried = [[layer for layers, _ in stack for layer in layers] for stack in inputs]
        together = list(dict.fromkeys(itertools.chain(*carried)))
        dtype = next(stack[0][1].dtype for stack in inputs if stack)
        joined = []
        for stack, name, layers in zip(inputs, operation.inputs, carried, strict=True):
            if len(stack) == 1 and layers == together:
                joined.append(stack[0][1])
                continue
            pieces = [piece.to(dtype) for piece in self.pieces(stack, together, name)]
            joined.append(torch.cat(pieces))
            if layers == together:  # the next operation that reads the value need not join it
                stack[:] = [(layers, joined[-1])]
        return together, self.network.compute(operation, joined)

    def _to_add_in_place(
        self, operation: Operation, inputs: Sequence[_Stack]
    ) -> tuple[_Stack, str, _Stack, str] | None:
        """Return the operands, first the one to add to; None if neither may be overwritten."""
        first, second = zip(inputs, operation.inputs, strict=True)
        shapes = {self.network.shapes[name] for name in operation.inputs}
        if len(shapes) > 1:
            return None
        for one, other in ((first, second), (second, first)):
            if self.network.may_overwrite(operation, one[1]):
                return (*one, *other)
        return None

    def _add(self, first: _Stack, first_name: str, second: _Stack, second_name: str) -> _Stack:
        """Add the second operand to the first one, in the memory of the first."""
        for layers, tensor in first:
            start = 0
            for piece in self.pieces(second, layers, second_name):
                tensor[start : start + len(piece)].add_(piece.to(tensor.dtype))
                start += len(piece)
        carried = {layer for layers, _ in first for layer in layers}
        left = [layer for layers, _ in second for layer in layers if layer not in carried]
        added = [
            ([layer], self.dense[first_name][self.rows[layer]].to(piece.dtype) + piece)
            for layer in left
            for piece in self.pieces(second, [layer], second_name)
        ]
        return [*first, *added]

    def _start(self, operation: Operation) -> torch.Tensor:
        inputs = [self.dense[name][self.rows[operation.name]] for name in operation.inputs]
        variant = self.variants[operation.name]
        if not isinstance(variant, Layer):
            return variant(*inputs)
        return self.network.compute(operation, inputs, layer=variant)

    def _count(self, layer: str) -> int:
        rows = self.rows[layer]
        return len(rows) if isinstance(rows, torch.Tensor) else len(next(iter(self.dense.values())))


# --- the folded ResNet18, until nothing needs it any more -----------------------------------------


@dataclass(frozen=True)
class Convolution:
    """A convolution of a folded network: y = conv(x, weight) + bias."""

    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    padding: int

    @classmethod
    def of(cls, model: ResNet18, name: str) -> Convolution:
        """Fold a convolution of a model in eval mode."""
        conv, (weight, bias) = model.get_submodule(name), fold_weights(model, name)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(weight, bias, conv.stride[0], conv.padding[0])

    def masked(self, kept: torch.Tensor) -> Convolution:
        """Return the convolution without the weights that are not ``kept`` (bool, same shape)."""
        return replace(self, weight=self.weight.masked_fill(~kept, 0))

    def to(self, dtype: torch.dtype) -> Convolution:
        """Return the convolution in another precision."""
        return replace(self, weight=self.weight.to(dtype), bias=self.bias.to(dtype))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


@dataclass(frozen=True)
class Block:
    """A basic block: relu(conv2(relu(conv1(x))) + shortcut(x))."""

    conv1: Convolution
    conv2: Convolution
    shortcut: Convolution | None

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added back: the input itself, or its 1×1 convolution."""
        return x if self.shortcut is None else self.shortcut(x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map the block's input to its output; ``x`` is left as it is."""
        return self.conv2(self.conv1(x).relu_()).add_(self.shortcut_of(x)).relu_()


@dataclass(frozen=True)
class FoldedNetwork:
    """The network for inference, its batch norms folded; the model itself is not touched."""

    stem: Convolution
    blocks: dict[str, Block]
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor

    @classmethod
    def of(cls, model: ResNet18) -> FoldedNetwork:
        """Fold a model in eval mode."""
        stem, *inner, _ = prunable_layers(model)
        parts = {name: Convolution.of(model, name) for name in inner}
        blocks = {
            name: Block(*(parts.get(f"{name}.{part}") for part in ("conv1", "conv2", "shortcut.0")))
            for name in BLOCKS
        }
        weight, bias = (tensor.detach() for tensor in (model.linear.weight, model.linear.bias))
        return cls(Convolution.of(model, stem), blocks, weight, bias)

    def convolutions(self) -> dict[str, Convolution]:
        """Return the convolutions by name, in the order in which branches leave."""
        found = {"conv1": self.stem}
        for name, block in self.blocks.items():
            found |= {f"{name}.conv1": block.conv1, f"{name}.conv2": block.conv2}
            if block.shortcut is not None:
                found[f"{name}.shortcut.0"] = block.shortcut
        return found

    def to(self, dtype: torch.dtype) -> FoldedNetwork:
        """Return the network with its convolutions in ``dtype``; the linear layer stays FP32."""
        blocks = {
            name: Block(b.conv1.to(dtype), b.conv2.to(dtype), b.shortcut and b.shortcut.to(dtype))
            for name, b in self.blocks.items()
        }
        return FoldedNetwork(self.stem.to(dtype), blocks, self.linear_weight, self.linear_bias)

    def classify(self, features: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Map features (N, channels) to logits (N, classes), by another ``weight`` if given."""
        return F.linear(
            features, self.linear_weight if weight is None else weight, self.linear_bias
        )


@dataclass(frozen=True)
class BlockTrace:
    """What the dense network computed in one block, for branches to start from."""

    x: torch.Tensor
    hidden: torch.Tensor
    shortcut: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True)
class Trace:
    """What the dense network computed on a batch: FP32, one entry a block."""

    images: torch.Tensor
    blocks: dict[str, BlockTrace]
    features: torch.Tensor


def trace_dense(network: FoldedNetwork, images: torch.Tensor) -> Trace:
    """Run normalised images (N, 3, H, W) through the dense network, keeping what branches need."""
    x = network.stem(images).relu_()
    traces = {}
    for name, block in network.blocks.items():
        hidden = block.conv1(x).relu_()
        shortcut = block.shortcut_of(x)
        residual = block.conv2(hidden)
        traces[name] = BlockTrace(x, hidden, shortcut, residual)
        x = (residual + shortcut).relu_()
    return Trace(images, traces, pool(x))


def pool(x: torch.Tensor) -> torch.Tensor:
    """Average (N, C, H, W) over the image to (N, C), in FP32."""
    return x.mean(dim=(2, 3), dtype=torch.float32)
