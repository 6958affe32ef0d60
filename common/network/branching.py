"""The walk behind the scan: a network once, and every variant of it branching off.

A variant is the network with one layer replaced. Each batch runs through the dense network once,
and a variant starts at its replaced layer: the operations before it are not repeated. All variants
that have started are stacked along the batch dimension, so that an operation runs once for all of
them. For the 21 layers of ResNet18 that is 6.0 instead of 11.7 billion multiply-adds an image. A
plain chain of L layers takes about L / 2 passes, whatever the batches: the rest of the speed comes
from fewer and larger operations.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from common.network.execution import Layer, Network
from common.network.graph import ACTIVATIONS, ADD, Graph, Operation, evaluate

# What a layer becomes: other weights, or a function of its input that returns new memory.
Variant = Layer | Callable[[torch.Tensor], torch.Tensor]
Rows = torch.Tensor | slice


def start_values(graph: Graph, layers: Collection[str]) -> list[str]:
    """Return the operations whose dense values the variants need: at their start, and at joins."""
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
    network: Network, dense: Mapping[str, torch.Tensor], variants: Mapping[str, Variant],
    rows: Mapping[str, Rows] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the logits of every variant, one after the other: FP32, (rows of all, classes).

    The dense network has the precision of the variants, which replace its layers. ``dense`` holds
    its values that :func:`start_values` names, in any precision; they are not changed. ``rows`` are
    for each layer the images of the batch to run its variant on; all by default.
    """
    walk = _Walk(network, dense, variants, rows or dict.fromkeys(variants, slice(None)))
    graph = network.graph
    found = evaluate(graph, walk.compute, {graph.input: []}, [graph.output])[graph.output]
    return torch.cat(list(walk.pieces(found, list(variants), graph.output))).float()


# The values of several variants: tensors, each with the layers that its variants replace, one
# variant's rows after the other's. They are joined only where an operation needs one tensor.
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
            run, in_place = self.network.compute, operation.name in self.network.overwriting
            found = [(layers, run(operation, [x], in_place)) for layers, x in inputs[0]]
        else:
            found = [self._run_joined(operation, inputs)]
        if operation.name in self.variants:
            found.append(([operation.name], self._start(operation)))
        return found

    def pieces(self, stack: _Stack, layers: Sequence[str], name: str) -> Iterator[torch.Tensor]:
        """Yield a value in the order of ``layers``; variants that it lacks take the dense one."""
        held: dict[str, torch.Tensor] = {}
        for own, tensor in stack:
            held |= zip(own, tensor.split([self._count(layer) for layer in own]), strict=True)
        for layer in layers:
            yield held[layer] if layer in held else self.dense[name][self.rows[layer]]

    def _run_joined(
        self, operation: Operation, inputs: Sequence[_Stack]
    ) -> tuple[list[str], torch.Tensor]:
        carried = [_layers_in(stack) for stack in inputs]
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
        if len({self.network.shapes[name] for name in operation.inputs}) > 1:
            return None
        for one, other in itertools.permutations(zip(inputs, operation.inputs, strict=True)):
            if self.network.may_overwrite(operation, one[1]):
                return (*one, *other)
        return None

    def _add(self, first: _Stack, first_name: str, second: _Stack, second_name: str) -> _Stack:
        """Add the second operand to the first one, in the memory of the first."""
        carried, found = _layers_in(first), list(first)
        added = self.pieces(second, carried, second_name)
        for x, y in zip(self.pieces(first, carried, first_name), added, strict=True):
            x.add_(y.to(x.dtype))
        others = [layer for layer in _layers_in(second) if layer not in carried]
        for layer, y in zip(others, self.pieces(second, others, second_name), strict=True):
            dense = self.dense[first_name][self.rows[layer]]
            found.append(([layer], dense.to(y.dtype) + y))
        return found

    def _start(self, operation: Operation) -> torch.Tensor:
        inputs = [self.dense[name][self.rows[operation.name]] for name in operation.inputs]
        variant = self.variants[operation.name]
        if not isinstance(variant, Layer):
            return variant(*inputs)
        return self.network.compute(operation, inputs, layer=variant)

    def _count(self, layer: str) -> int:
        rows = self.rows[layer]
        return len(rows) if isinstance(rows, torch.Tensor) else len(next(iter(self.dense.values())))


def _layers_in(stack: _Stack) -> list[str]:
    return [layer for layers, _ in stack for layer in layers]
