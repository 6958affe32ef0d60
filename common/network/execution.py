"""A network ready to run: a graph, and the weights of its layers with batch norms folded in."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from common.network import graph as kinds
from common.network.graph import Graph, Operation, evaluate
from common.network.operations import MAY_OVERWRITE, Layer, compute, infer_shapes


@dataclass(frozen=True)
class Network:
    """A graph, and by name the weights of the operations that have any; for inference."""

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

        def step(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
            in_place = operation.name in self.overwriting and operation.inputs[0] not in protected
            return self.compute(operation, inputs, in_place)

        return evaluate(self.graph, step, given, wanted)

    def compute(
        self, operation: Operation, inputs: Sequence[torch.Tensor], in_place: bool = False,
        layer: Layer | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return an operation's value; ``layer`` takes the place of the network's own weights."""
        return compute(operation, inputs, layer or self.layers.get(operation.name), in_place)

    @functools.cached_property
    def overwriting(self) -> frozenset[str]:
        """The names of the operations that may reuse their first input's memory."""
        able = (o for o in self.graph.operations if o.kind in MAY_OVERWRITE)
        return frozenset(o.name for o in able if self.may_overwrite(o, o.inputs[0]))

    def may_overwrite(self, operation: Operation, source: str) -> bool:
        """Return whether an input's value is new memory that no other operation reads."""
        is_new = self.graph[source].kind not in (kinds.INPUT, *kinds.VIEWS)
        return is_new and self.graph.users[source] == (operation.name,)

    def to(self, dtype: torch.dtype) -> "Network":
        """Return the network with its convolutions in ``dtype``; linear layers stay as they are.

        Values take the precision of the convolution before them; averages over the image and
        logits are FP32.
        """
        is_linear = {name: self.graph[name].kind == kinds.LINEAR for name in self.layers}
        return self.with_layers(
            {name: layer.to(dtype) for name, layer in self.layers.items() if not is_linear[name]}
        )

    def with_layers(self, layers: Mapping[str, Layer]) -> "Network":
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
