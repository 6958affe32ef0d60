"""torch's quantized kernels for operations without weights, as functions of their values alone."""

import functools
from collections.abc import Callable

import torch

from common.network import graph as kinds
from quantization.int8.fusion import FusedOperation
from quantization.int8.network import MAX_LEVEL, Int8Network, ValueRange

QUANTIZED, ATEN = torch.ops.quantized, torch.ops.aten

Function = Callable[..., torch.Tensor]


def kernel_of(
    step: FusedOperation, engine: str
) -> Callable[[FusedOperation, ValueRange], Function] | None:
    """Return what makes the function of a step that is no layer; None where torch has no kernel."""
    if engine == "qnnpack" and step.operation.kind == "sigmoid":  # its kernel has one range only
        return None
    return KERNELS.get(step.operation.kind)


def fp32_activations(network: Int8Network, engine: str) -> dict[str, str]:
    """Return the activations that an engine has no integer kernel for."""
    return {
        step.name: "no integer kernel in torch: computed between a dequantize and a quantize"
        for step in network.steps()
        if step.operation.kind in kinds.ACTIVATIONS and kernel_of(step, engine) is None
    }


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


def _multiply(step: FusedOperation, kept: ValueRange) -> Function:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate, value = sorted((x, y), key=torch.numel)  # the result has the first one's layout
        return QUANTIZED.mul.default(value, gate, kept.scale, kept.zero_point)

    return run


def _global_pool(step: FusedOperation, kept: ValueRange) -> Function:
    if step.operation.attributes["keep"]:
        return lambda x: ATEN.adaptive_avg_pool2d.default(x, [1, 1])
    return lambda x: ATEN.flatten.using_ints(ATEN.adaptive_avg_pool2d.default(x, [1, 1]), 1)


def _slice(step: FusedOperation, kept: ValueRange) -> Function:
    parts = step.operation.attributes["parts"]
    return lambda x: functools.reduce(lambda y, part: ATEN.slice.Tensor(y, *part), parts, x)


def _with_range(kernel: Function) -> Callable[..., Function]:
    """Return what makes the function of a kernel that takes the range of its result."""
    return lambda step, kept: lambda *x: kernel(*x, kept.scale, kept.zero_point)


def _on_levels(kernel: Function) -> Callable[..., Function]:
    """Return what makes the function of a kernel that takes FP32's arguments, and any dtype."""

    def make(step: FusedOperation, kept: ValueRange) -> Function:
        arguments = step.operation.arguments
        return lambda x: kernel(x, *arguments)

    return make


def _add(step: FusedOperation, kept: ValueRange) -> Function:
    kernel = QUANTIZED.add_relu if step.activation else QUANTIZED.add
    return _with_range(kernel.default)(step, kept)


# What makes the function of each kind of operation from its step and the range of its value.
KERNELS: dict[str, Callable[[FusedOperation, ValueRange], Function]] = {
    kinds.ADD: _add,
    kinds.MULTIPLY: _multiply,
    kinds.CONCATENATE: lambda step, kept: (
        lambda *x: QUANTIZED.cat.default(x, 1, kept.scale, kept.zero_point)
    ),
    kinds.MAX_POOL: _on_levels(ATEN.max_pool2d.default),
    kinds.AVERAGE_POOL: _on_levels(ATEN.avg_pool2d.default),
    kinds.ADAPTIVE_POOL: _on_levels(ATEN.adaptive_avg_pool2d.default),
    kinds.GLOBAL_POOL: _global_pool,
    kinds.FLATTEN: lambda step, kept: lambda x: ATEN.flatten.using_ints(x, 1),
    kinds.RESHAPE: lambda step, kept: (
        lambda x: ATEN.reshape.default(x, [-1, *step.operation.attributes["shape"]])
    ),
    kinds.PERMUTE: _on_levels(ATEN.permute.default),
    kinds.SLICE: _slice,
    kinds.PAD: _on_levels(ATEN.constant_pad_nd.default),
    # These look a level up, or compute it from the real value, in one pass.
    "hardswish": _with_range(QUANTIZED.hardswish.default),
    "sigmoid": _with_range(QUANTIZED.sigmoid.default),
}
