"""A network as a graph of names, kinds and numbers, without code, so that a file can hold it."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

INPUT, CONVOLUTION, LINEAR, AFFINE = "input", "convolution", "linear", "affine"
ADD, MULTIPLY, CONCATENATE = "add", "multiply", "concatenate"
MAX_POOL, AVERAGE_POOL = "max_pool", "average_pool"
ADAPTIVE_POOL, GLOBAL_POOL = "adaptive_average_pool", "global_average_pool"
FLATTEN, RESHAPE, PERMUTE, SLICE, PAD = "flatten", "reshape", "permute", "slice", "pad"
ACTIVATIONS = ("relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu")

WEIGHTED = (CONVOLUTION, LINEAR)  # the layers: what is pruned, quantized and coded
POOLS = (MAX_POOL, AVERAGE_POOL, ADAPTIVE_POOL, GLOBAL_POOL)
VIEWS = (FLATTEN, RESHAPE, PERMUTE, SLICE)  # may share the memory of their input
KINDS = (
    INPUT, *WEIGHTED, AFFINE, ADD, MULTIPLY, CONCATENATE, *POOLS, *VIEWS, PAD, *ACTIVATIONS,
)  # fmt: skip

# Attributes of each kind, in the order in which torch's function takes them after its tensors. Two
# numbers are for height and width.
ATTRIBUTES = {
    INPUT: ("shape",),  # channels, height, width
    CONVOLUTION: ("stride", "padding", "dilation", "groups"),
    MAX_POOL: ("kernel", "stride", "padding", "dilation", "ceil"),
    AVERAGE_POOL: ("kernel", "stride", "padding", "ceil", "count_padding"),
    ADAPTIVE_POOL: ("size",),  # in files also source_size, the input's height and width
    GLOBAL_POOL: ("keep",),  # whether to keep height and width, which become 1
    RESHAPE: ("shape",),  # new shape without the batch dimension
    PERMUTE: ("order",),  # new order of the dimensions, the batch's first
    SLICE: ("parts",),  # each a dimension, start, stop and step
    PAD: ("padding",),  # zeros before and after each dimension, the last dimension first
}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Operation:
    """One operation of a network."""

    name: str  # unique; a layer has the name of its module, such as layer1.0.conv1
    kind: str  # one of KINDS
    inputs: tuple[str, ...] = ()  # names of the operations whose values it reads
    attributes: Mapping[str, Any] = field(default_factory=dict)  # by the names in ATTRIBUTES

    @property
    def is_layer(self) -> bool:
        """Whether the operation is a convolution or a linear layer."""
        return self.kind in WEIGHTED

    @property
    def arguments(self) -> list:
        """The attributes, in the order of torch's function."""
        return [self.attributes[name] for name in ATTRIBUTES.get(self.kind, ())]


@dataclass(frozen=True)
class Graph:
    """Operations in execution order: the first is the input, the last one gives the logits.

    An unknown kind, a name given twice or an input that is no earlier operation is a ValueError.
    """

    operations: tuple[Operation, ...]

    def __post_init__(self):
        seen: set[str] = set()
        for operation in self.operations:
            if operation.kind not in KINDS:
                raise ValueError(f"{operation.name}: unknown kind {operation.kind}")
            if operation.name in seen:
                raise ValueError(f"two operations are called {operation.name}")
            if not seen.issuperset(operation.inputs):
                raise ValueError(f"{operation.name} reads a value that is not computed before it")
            if (operation.kind == INPUT) != (not seen):
                raise ValueError("the first operation, and no other, is the input")
            if (operation.kind == INPUT) != (not operation.inputs):
                raise ValueError(f"{operation.name} has no input")
            seen.add(operation.name)
        if not seen:
            raise ValueError("a graph without operations")

    def __getitem__(self, name: str) -> Operation:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @functools.cached_property
    def _by_name(self) -> Mapping[str, Operation]:
        return {operation.name: operation for operation in self.operations}

    @property
    def input(self) -> str:
        """The name of the first operation, whose value is the images."""
        return self.operations[0].name

    @property
    def output(self) -> str:
        """The name of the last operation, whose value is the logits."""
        return self.operations[-1].name

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """The names of the convolutions and linear layers, in execution order."""
        return tuple(operation.name for operation in self.operations if operation.is_layer)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the operations that read each operation's value."""
        found: dict[str, tuple[str, ...]] = {operation.name: () for operation in self.operations}
        for operation in self.operations:
            for name in dict.fromkeys(operation.inputs):
                found[name] += (operation.name,)
        return found

    def sole_user(self, name: str) -> Operation | None:
        """Return the one operation that reads a value; None where there are none or several."""
        users = self.users[name]
        return self[users[0]] if len(users) == 1 else None

    def affected_by(self, names: Iterable[str]) -> set[str]:
        """Return the names of these operations and of all that depend on them."""
        found = set(names)
        for operation in self.operations:
            if not found.isdisjoint(operation.inputs):
                found.add(operation.name)
        return found

    def to_json(self) -> list[dict]:
        """Return the operations as JSON has them."""
        return [
            {"name": o.name, "kind": o.kind, "inputs": list(o.inputs), **o.attributes}
            for o in self.operations
        ]

    @classmethod
    def from_json(cls, content: object) -> "Graph":
        """Return the graph that :meth:`to_json` wrote; a ValueError if the content is none."""
        operations = []
        try:
            for entry in content:
                attributes = dict(entry)
                name, kind, inputs = (attributes.pop(key) for key in ("name", "kind", "inputs"))
                if not all(isinstance(text, str) for text in (name, kind, *inputs)):
                    raise TypeError("a name that is not a string")
                operations.append(Operation(name, kind, tuple(inputs), attributes))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not a graph: {error}") from None
        return cls(tuple(operations))


def evaluate(
    graph: Graph, compute: Callable[[Operation, list[Value]], Value], given: Mapping[str, Value],
    wanted: Sequence[str],
) -> dict[str, Value]:  # fmt: skip
    """Return the wanted values; run only the operations between them and the given values.

    ``compute`` returns an operation's value from its inputs', which are freed after their last use.
    """
    needed, operations = set(wanted) - set(given), []
    for operation in reversed(graph.operations):
        if operation.name in needed:
            operations.append(operation)
            needed.update(name for name in operation.inputs if name not in given)
    operations.reverse()
    uses = Counter(name for operation in operations for name in dict.fromkeys(operation.inputs))
    values = {name: given[name] for name in {*uses, *wanted} if name in given}
    for operation in operations:
        values[operation.name] = compute(operation, [values[name] for name in operation.inputs])
        for name in dict.fromkeys(operation.inputs):
            uses[name] -= 1
            if not uses[name] and name not in wanted:
                del values[name]
    return {name: values[name] for name in wanted}
