"""Operations fused into steps: an activation or an addition runs inside of the operation before."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from common.network import graph as kinds
from common.network.graph import Graph, Operation

FUSED_ACTIVATIONS = ("relu", "relu6")  # run by the operation before them: they only clip
ACTIVATED = (*kinds.WEIGHTED, kinds.ADD, kinds.AFFINE)  # can run such an activation


@dataclass(frozen=True)
class FusedOperation:
    """One operation of an INT8 network with what is fused into it."""

    name: str  # of its value: the graph's name of the last operation in it
    operation: Operation  # the first operation in it
    activation: str | None = None  # what it clips with, ``relu`` or ``relu6``
    added: str | None = None  # name of the value that a convolution adds before the activation

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the values that it reads, which other steps give."""
        return self.operation.inputs + ((self.added,) if self.added else ())


def fuse_activations(
    graph: Graph, activations: Collection[str] = FUSED_ACTIVATIONS
) -> tuple[FusedOperation, ...]:
    """Return a graph's steps: each operation, with the activation that alone reads its value."""
    steps, fused = [], set()
    for operation in graph.operations:
        if operation.name in fused:
            continue
        name, activation, reader = operation.name, None, graph.sole_user(operation.name)
        is_activated = operation.kind in ACTIVATED and name != graph.output
        if is_activated and reader is not None and reader.kind in activations:
            name, activation = reader.name, reader.kind
            fused.add(name)
        steps.append(FusedOperation(name, operation, activation))
    return tuple(steps)


def fuse_additions(
    steps: Sequence[FusedOperation], graph: Graph, can_add: Callable[[FusedOperation, str], bool]
) -> tuple[FusedOperation, ...]:
    """Return the graph's steps with additions inside of the last convolution that they read.

    The result of such a convolution is not rounded before it is added. ``can_add`` returns whether
    a convolution's step can add the value of a name.
    """
    positions = {step.name: index for index, step in enumerate(steps)}
    found: list[FusedOperation | None] = list(steps)
    for index, step in enumerate(steps):
        if step.operation.kind != kinds.ADD or len(set(step.inputs)) != 2:
            continue
        for source in sorted(step.inputs, key=positions.get, reverse=True):
            before = found[positions[source]]
            is_free = before.activation is None and before.added is None
            is_free &= before.operation.kind == kinds.CONVOLUTION and len(graph.users[source]) == 1
            (other,) = set(step.inputs) - {source}
            if is_free and can_add(before, other):
                found[positions[source]] = None
                found[index] = replace(
                    before, name=step.name, activation=step.activation, added=other
                )
                break
    return tuple(step for step in found if step is not None)


def may_overwrite(step: FusedOperation, steps: Sequence[FusedOperation]) -> bool:
    """Return whether a convolution may write its result over the value that it adds.

    It may if no later step reads that value, nor another value that shares its memory.
    """
    positions = {other.name: index for index, other in enumerate(steps)}
    readers = [other for other in steps if step.added in other.inputs]
    sharing = (*readers, steps[positions[step.added]])
    return (
        all(positions[reader.name] <= positions[step.name] for reader in readers)
        and not any(other.operation.kind in kinds.VIEWS for other in sharing)
        and step.added not in (*step.operation.inputs, steps[0].name)
    )
