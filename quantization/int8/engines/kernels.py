"""torch's quantized kernels for operations without weights, as functions of their values alone."""

from collections.abc import Callable

import torch

from common.network import graph as kinds
from common.network.operations import compute
from quantization.int8.fusion import FusedOperation
from quantization.int8.network import MAX_LEVEL, ValueRange

QUANTIZED, ATEN = torch.ops.quantized, torch.ops.aten

Function = Callable[..., torch.Tensor]

# Kernels that take the range of their result. Those of activations look a level up, or compute it
# from the real value, in one pass.
WITH_RANGE = {
    kinds.ADD: QUANTIZED.add.default,
    "hardswish": QUANTIZED.hardswish.default,
    "sigmoid": QUANTIZED.sigmoid.default,
}
# Kinds of operations whose FP32 functions take levels too.
ON_LEVELS = (
    kinds.MAX_POOL, kinds.AVERAGE_POOL, kinds.ADAPTIVE_POOL, kinds.FLATTEN, kinds.PERMUTE,
    kinds.SLICE, kinds.PAD,
)  # fmt: skip


def kernel_of(step: FusedOperation, kept: ValueRange | None, engine: str) -> Function | None:
    """Return the function of a step that is no layer, without ReLU6; None if torch has no kernel.

    ``kept`` is the range of the step's value.
    """
    operation = step.operation
    if engine == "qnnpack" and operation.kind == "sigmoid":  # its kernel has one range only
        return None
    if operation.kind in ON_LEVELS:
        return lambda x: compute(operation, [x], None, in_place=False)
    if operation.kind in WITH_RANGE:
        kernel = QUANTIZED.add_relu.default if step.activation else WITH_RANGE[operation.kind]
        return lambda *values: kernel(*values, kept.scale, kept.zero_point)
    match operation.kind:
        case kinds.MULTIPLY:
            return lambda x, y: _multiply(x, y, kept)
        case kinds.CONCATENATE:
            return lambda *values: QUANTIZED.cat.default(values, 1, kept.scale, kept.zero_point)
        case kinds.GLOBAL_POOL:
            return lambda x: _global_pool(x, operation.attributes["keep"])
        case kinds.RESHAPE:
            return lambda x: ATEN.reshape.default(x, [-1, *operation.attributes["shape"]])
    return None


def _multiply(x: torch.Tensor, y: torch.Tensor, kept: ValueRange) -> torch.Tensor:
    gate, value = sorted((x, y), key=torch.numel)  # the result has the first one's layout
    return QUANTIZED.mul.default(value, gate, kept.scale, kept.zero_point)


def _global_pool(x: torch.Tensor, keeps_dimensions: bool) -> torch.Tensor:
    pooled = ATEN.adaptive_avg_pool2d.default(x, [1, 1])
    return pooled if keeps_dimensions else ATEN.flatten.using_ints(pooled, 1)


def store(real: torch.Tensor, kept: ValueRange | None) -> torch.Tensor:
    """Quantize real values, if they are kept in uint8."""
    if kept is None:
        return real
    return ATEN.quantize_per_tensor.default(real, kept.scale, kept.zero_point, torch.quint8)


def clipped(run: Function, step: FusedOperation, kept: ValueRange) -> Function:
    """Clip at 6 what a ReLU6 lets through, where uint8 does not end there anyway."""
    if step.activation != "relu6" or kept.zero_point + round(6 / kept.scale) >= MAX_LEVEL:
        return run

    def run_and_clip(*values: torch.Tensor) -> torch.Tensor:
        result = run(*values)
        if result.ndim != 4:
            return ATEN.clamp.default(result, 0.0, 6.0)
        # Channels last in the shape too: qnnpack's kernel ignores the memory layout.
        moved = ATEN.clamp.default(result.permute(0, 2, 3, 1), 0.0, 6.0)
        return moved.permute(0, 3, 1, 2)

    return run_and_clip
