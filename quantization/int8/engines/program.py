"""Kernel calls in a row: what is left of a network once it is made ready to run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.network.graph import VIEWS
from quantization.int8.fusion import FusedOperation


@dataclass(frozen=True)
class Call:
    """A call of a kernel."""

    name: str  # name of the value that it returns
    function: Callable[..., torch.Tensor]  # the kernel, with all but the values bound to it
    inputs: tuple[str, ...]  # names of the values that it takes
    constants: tuple[object, ...] = ()  # packed weights and tensors that the function holds


class Program(nn.Module):
    """Runs calls, from that which takes the images; each value is freed after its last use."""

    def __init__(self, calls: Sequence[Call]):
        super().__init__()
        self._source, self._output = calls[0].inputs[0], calls[-1].name
        last_uses = {name: call for call in calls for name in call.inputs}
        self._calls = [
            (call, [name for name in {*call.inputs} - {call.name} if last_uses[name] is call])
            for call in calls
        ]
        # A trace knows the packed weights and tensors that are attributes of its module.
        constants = [constant for call in calls for constant in call.constants]
        for index, constant in enumerate(constants):
            if isinstance(constant, torch.Tensor):
                self.register_buffer(f"constant_{index}", constant, persistent=False)
            else:
                setattr(self, f"constant_{index}", constant)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images to FP32 logits."""
        values = {self._source: images}
        for call, freed in self._calls:
            values[call.name] = call.function(*[values[name] for name in call.inputs])
            for name in freed:
                del values[name]
        logits = values[self._output]
        return logits.dequantize() if logits.is_quantized else logits


def may_overwrite(step: FusedOperation, steps: Sequence[FusedOperation]) -> bool:
    """Return whether a convolution may write its result over the value that it adds.

    It may if no later step reads that value, nor another value that shares its memory.
    """
    positions = {other.name: index for index, other in enumerate(steps)}
    readers = [other for other in steps if step.added in other.inputs]
    sharing = (*readers, steps[positions[step.added]])
    return (
        all(positions[reader.name] <= positions[step.name] for reader in readers)
        and not any(other.operation.kind in VIEWS for other in sharing)
        and step.added not in (*step.operation.inputs, steps[0].name)
    )
