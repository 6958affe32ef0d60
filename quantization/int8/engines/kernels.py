"""torch's quantized kernels for operations without weights, as functions of their values alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.network.graph import (
    ACTIVATIONS,
    ADAPTIVE_POOL,
    ADD,
    AVERAGE_POOL,
    CONCATENATE,
    FLATTEN,
    GLOBAL_POOL,
    MAX_POOL,
    MULTIPLY,
    PAD,
    PERMUTE,
    RESHAPE,
    SLICE,
)
from quantization.int8.network import MAX_LEVEL, FusedOperation, Int8Network, ValueRange

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
        if step.operation.kind in ACTIVATIONS and kernel_of(step, engine) is None
    }


def store(real: torch.Tensor, kept: ValueRange | None) -> torch.Tensor:
    """Quantize real values, if they are kept in uint8."""
    if kept is None:
        return real
    return ATEN.quantize_per_tensor.default(real, kept.scale, kept.zero_point, torch.quint8)


def clipped(run: Function, step: FusedOperation, kept: ValueRange) -> Function:
    """Clip at 6 what a ReLU6 lets through, where uint8 does not end there anyway."""
    if step.activation != "relu6" or kept.clip_levels("relu6")[1] == MAX_LEVEL:
        return run

    def run_and_clip(*values: torch.Tensor) -> torch.Tensor:
        result = run(*values)
        if result.ndim != 4:
            return ATEN.clamp.default(result, 0.0, 6.0)
        # Channels last in the shape too: qnnpack's kernel ignores the memory layout.
        moved = ATEN.clamp.default(result.permute(0, 2, 3, 1), 0.0, 6.0)
        return moved.permute(0, 3, 1, 2)

    return run_and_clip


def _add(step: FusedOperation, kept: ValueRange) -> Function:
    kernel = (QUANTIZED.add_relu if step.activation else QUANTIZED.add).default
    return lambda x, y: kernel(x, y, kept.scale, kept.zero_point)


def _multiply(step: FusedOperation, kept: ValueRange) -> Function:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate, value = sorted((x, y), key=torch.numel)  # the result has the first one's layout
        return QUANTIZED.mul.default(value, gate, kept.scale, kept.zero_point)

    return run


def _concatenate(step: FusedOperation, kept: ValueRange) -> Function:
    return lambda *values: QUANTIZED.cat.default(values, 1, kept.scale, kept.zero_point)


def _max_pool(step: FusedOperation, kept: ValueRange) -> Function:
    a = step.operation.attributes
    settings = [*(list(a[key]) for key in ("kernel", "stride", "padding", "dilation")), a["ceil"]]
    return lambda x: ATEN.max_pool2d.default(x, *settings)


def _average_pool(step: FusedOperation, kept: ValueRange) -> Function:
    a = step.operation.attributes
    settings = [*(list(a[key]) for key in ("kernel", "stride", "padding")), a["ceil"]]
    return lambda x: ATEN.avg_pool2d.default(x, *settings, a["count_padding"])


def _adaptive_pool(step: FusedOperation, kept: ValueRange) -> Function:
    size = list(step.operation.attributes["size"])
    return lambda x: ATEN.adaptive_avg_pool2d.default(x, size)


def _global_pool(step: FusedOperation, kept: ValueRange) -> Function:
    if step.operation.attributes["keep"]:
        return lambda x: ATEN.adaptive_avg_pool2d.default(x, [1, 1])
    return lambda x: ATEN.flatten.using_ints(ATEN.adaptive_avg_pool2d.default(x, [1, 1]), 1)


def _flatten(step: FusedOperation, kept: ValueRange) -> Function:
    return lambda x: ATEN.flatten.using_ints(x, 1)


def _reshape(step: FusedOperation, kept: ValueRange) -> Function:
    shape = [-1, *step.operation.attributes["shape"]]  # of a batch of any size
    return lambda x: ATEN.reshape.default(x, shape)


def _permute(step: FusedOperation, kept: ValueRange) -> Function:
    order = list(step.operation.attributes["order"])
    return lambda x: ATEN.permute.default(x, order)


def _slice(step: FusedOperation, kept: ValueRange) -> Function:
    def run(x: torch.Tensor) -> torch.Tensor:
        for part in step.operation.attributes["parts"]:
            x = ATEN.slice.Tensor(x, *part)
        return x

    return run


def _pad(step: FusedOperation, kept: ValueRange) -> Function:
    padding = list(step.operation.attributes["padding"])
    return lambda x: ATEN.constant_pad_nd.default(x, padding, 0.0)


def _activation(kernel: Function) -> Callable[[FusedOperation, ValueRange], Function]:
    return lambda step, kept: lambda x: kernel(x, kept.scale, kept.zero_point)


# They look a level up, or compute it from the real value, in one pass.
ACTIVATION_KERNELS = {
    "hardswish": _activation(QUANTIZED.hardswish.default),
    "sigmoid": _activation(QUANTIZED.sigmoid.default),
}
KERNELS: dict[str, Callable[[FusedOperation, ValueRange], Function]] = {
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
    **ACTIVATION_KERNELS,
}
