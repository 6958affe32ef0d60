"""The INT8 network's arithmetic in plain torch: slow, exact, for any CPU and any graph.

It is what engines are checked against, and what runs where there is no engine. Levels are whole
numbers in float64, which holds every sum of products exactly; each result is rounded once. Engines
multiply sums by scales in float32, so a result next to a half may round the other way there.
"""

from functools import partial

import torch

from common.network.execution import Layer
from common.network.graph import GLOBAL_POOL, Operation
from quantization.int8.engines.base import Call, Int8Model, Program
from quantization.int8.fusion import FusedOperation
from quantization.int8.network import CLIPS, MAX_LEVEL, SAME_RANGE, Int8Network


class ReferenceRunner(Int8Model):
    """Runs an INT8 network in the reference's arithmetic.

    Values in uint8 are kept as whole numbers less their zero point, in float64; others in float32.
    """

    def __init__(self, network: Int8Network, engine: str = "reference"):
        super().__init__(network, engine)
        self._fp32 = network.fp32_part()
        first, *steps = network.steps()
        calls = [Call(step.name, partial(self._compute, step), step.inputs) for step in steps]
        store_images = Call(first.name, partial(self._store, first), (first.name,))
        self._program = Program([store_images, *calls])

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return self._real(self.network.graph.output, self._program(images)).float()

    def _compute(self, step: FusedOperation, *inputs: torch.Tensor) -> torch.Tensor:
        """Return a step's value as it is kept."""
        operation = step.operation
        if operation.kind in SAME_RANGE:
            return self._move(operation, *inputs)
        if operation.is_layer and self.network.is_int8(operation):
            return self._store(step, self._multiply(step, *inputs))
        real = [self._real(*pair) for pair in zip(step.inputs, inputs, strict=True)]
        if not self.network.is_int8(operation):
            real = [value.float() for value in real]
        return self._store(step, self._fp32.compute(operation, real))

    def _move(self, operation: Operation, levels: torch.Tensor) -> torch.Tensor:
        """Run what only moves or averages levels; padding is 0, the zero point."""
        if operation.kind == GLOBAL_POOL:
            return levels.mean((2, 3), keepdim=operation.attributes["keep"]).round()
        return self._fp32.compute(operation, [levels]).round()

    def _multiply(self, step: FusedOperation, levels: torch.Tensor) -> torch.Tensor:
        """Return what a layer gives, as real numbers before the activation."""
        layer = self.network.layers[step.operation.name]
        scale = self.network.ranges[step.inputs[0]].scale
        integers = Layer(layer.weight.double(), layer.bias_levels(scale))
        sums = self._fp32.compute(step.operation, [levels], layer=integers)
        return sums * (scale * layer.scales.double()).view(-1, *[1] * (sums.ndim - 2))

    def _store(self, step: FusedOperation, real: torch.Tensor) -> torch.Tensor:
        """Apply a step's activation to its result and round it to the value's levels, if any."""
        real = CLIPS[step.activation](real)
        if step.name not in self.network.ranges:
            return real
        kept = self.network.ranges[step.name]
        levels = (real.double() / kept.scale).round()
        return levels.clamp(-kept.zero_point, MAX_LEVEL - kept.zero_point)

    def _real(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a value as real numbers."""
        kept = self.network.ranges.get(name)
        return value if kept is None else value * kept.scale
