"""The steps of an INT8 network as calls of torch's quantized kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.network.execution import Layer, Network
from common.network.graph import (
    ACTIVATIONS,
    ADAPTIVE_POOL,
    ADD,
    AVERAGE_POOL,
    CONCATENATE,
    FLATTEN,
    GLOBAL_POOL,
    INPUT,
    LINEAR,
    MAX_POOL,
    MULTIPLY,
    PAD,
    PERMUTE,
    RESHAPE,
    SLICE,
)
from quantization.int8.engines.base import value_shapes
from quantization.int8.engines.program import Call, may_overwrite
from quantization.int8.engines.switch import using
from quantization.int8.network import (
    MAX_LEVEL,
    Int8Network,
    Step,
    ValueRange,
    fuse_additions,
)

QUANTIZED, ATEN = torch.ops.quantized, torch.ops.aten
FUSES_ADDITIONS = "onednn"  # the engine whose convolutions can add
# Engines that run depthwise convolutions in fbgemm, whose kernel for them adds products in 16 bits,
# even on CPUs with VNNI: large sums saturate. oneDNN's are exact.
SATURATES_DEPTHWISE = ("fbgemm", "x86")
FLOAT_CLIPS = {None: lambda value: value, "relu": F.relu, "relu6": F.relu6}

Function = Callable[..., torch.Tensor]


def list_calls(network: Int8Network, engine: str) -> list[Call]:
    """Return the kernel calls of a network in execution order; the first takes the images.

    Weights are packed anew at each call of this function: a packed weight keeps the oneDNN kernel
    of the first shape that it meets.

    Args:
        network: Network to run.
        engine: One of torch's engines, which is not set by this function for the calls.
    """
    return _Builder(network, engine).build()


def fp32_activations(network: Int8Network, engine: str) -> dict[str, str]:
    """Return the activations that an engine has no integer kernel for."""
    return {
        step.name: "no integer kernel in torch: computed between a dequantize and a quantize"
        for step in network.steps()
        if step.operation.kind in ACTIVATIONS and _kernel_of(step, engine) is None
    }


class _Builder:
    def __init__(self, network: Int8Network, engine: str):
        self._network, self._engine, self._ranges = network, engine, network.ranges
        self._shapes = value_shapes(network)
        self._steps = network.steps()
        if engine == FUSES_ADDITIONS:
            self._steps = fuse_additions(self._steps, network.graph, self._can_add)
        self._fp32 = Network(
            network.graph,
            {
                **{
                    name: Layer(layer.weight, layer.bias)
                    for name, layer in network.layers.items()
                    if not layer.is_int8
                },
                **network.affine,
            },
        )

    def build(self) -> list[Call]:
        return [self._call(step) for step in self._steps]

    def _can_add(self, step: Step, added: str) -> bool:
        """Return whether a convolution can add a value: both in INT8, of one shape."""
        is_int8 = self._network.is_int8(step.operation) and added in self._ranges
        return is_int8 and self._shapes[step.name] == self._shapes[added]

    def _call(self, step: Step) -> Call:
        operation, kept = step.operation, self._ranges.get(step.name)
        if operation.kind == INPUT:
            return Call(step.name, functools.partial(_store, kept=kept), (step.name,))
        if operation.is_layer and self._network.is_int8(operation):
            return self._layer(step)
        make = _kernel_of(step, self._engine)
        if make is not None and self._network.is_int8(operation):
            return Call(step.name, _clipped(make(step, kept), step, kept), step.inputs)
        return self._in_fp32(step)

    def _layer(self, step: Step) -> Call:
        """Return the call of an INT8 convolution or linear layer."""
        kept, packed = self._ranges[step.name], self._pack(step)
        kernel = _layer_kernel(step)
        if step.added is None:

            def run(value: torch.Tensor) -> torch.Tensor:
                return kernel(value, packed, kept.scale, kept.zero_point)

            inputs = step.inputs
        else:
            is_free = may_overwrite(step, self._steps)

            def run(value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
                if not is_free:
                    added = added.clone(memory_format=torch.channels_last)
                return kernel(value, added, packed, kept.scale, kept.zero_point)

            inputs = (*step.inputs, step.added)
        return Call(step.name, _clipped(run, step, kept), inputs, (packed,))

    def _pack(self, step: Step) -> object:
        """Pack a layer's weights for the engine that runs it."""
        operation, engine = step.operation, self._engine
        layer, scale = (
            self._network.layers[operation.name],
            self._ranges[step.inputs[0]].scale,
        )
        bias = (layer.bias_levels(scale) * scale * layer.scales.double()).float()
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight,
            layer.scales.double(),
            torch.zeros(len(layer.scales), dtype=torch.int64),
            0,
        )
        if operation.kind == LINEAR:
            with using(engine):
                return QUANTIZED.linear_prepack.default(weight, bias)
        settings = operation.attributes
        is_depthwise = settings["groups"] == len(layer.weight) and layer.weight.shape[1] == 1
        if is_depthwise and engine in SATURATES_DEPTHWISE:
            engine = "onednn" if "onednn" in torch_engines() else engine
        with using(engine):
            return QUANTIZED.conv2d_prepack.default(
                weight, bias, list(settings["stride"]), list(settings["padding"]),
                list(settings["dilation"]), settings["groups"],
            )  # fmt: skip

    def _in_fp32(self, step: Step) -> Call:
        """Return a call that computes a step from real values."""
        operation, kept = step.operation, self._ranges.get(step.name)
        layer = self._fp32.layers.get(operation.name)
        clip = FLOAT_CLIPS[step.activation]

        def run(*values: torch.Tensor) -> torch.Tensor:
            real = [value.dequantize() if value.is_quantized else value for value in values]
            return _store(clip(self._fp32.compute(operation, real, layer=layer)), kept)

        constants = () if layer is None else (layer.weight, layer.bias)
        return Call(step.name, run, step.inputs, constants)


def _kernel_of(step: Step, engine: str) -> Callable[[Step, ValueRange], Function] | None:
    """Return what makes the function of a step that is no layer; None where torch has no kernel."""
    if engine == "qnnpack" and step.operation.kind == "sigmoid":  # its kernel has one range only
        return None
    return KERNELS.get(step.operation.kind)


def torch_engines() -> list[str]:
    """Return the names of the engines that this torch has on this CPU."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


def _layer_kernel(step: Step) -> Function:
    has_relu = step.activation is not None
    if step.operation.kind == LINEAR:
        return (QUANTIZED.linear_relu if has_relu else QUANTIZED.linear).default
    if step.added is not None:
        return (QUANTIZED.conv2d_add_relu if has_relu else QUANTIZED.conv2d_add).default
    return (QUANTIZED.conv2d_relu if has_relu else QUANTIZED.conv2d).new


def _store(real: torch.Tensor, kept: ValueRange | None) -> torch.Tensor:
    """Quantize real values, if they are kept in uint8."""
    if kept is None:
        return real
    return ATEN.quantize_per_tensor.default(real, kept.scale, kept.zero_point, torch.quint8)


def _clipped(run: Function, step: Step, kept: ValueRange) -> Function:
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


# --- kernels of other kinds: each returns a function of the values alone --------------------------


def _add(step: Step, kept: ValueRange) -> Function:
    kernel = (QUANTIZED.add_relu if step.activation else QUANTIZED.add).default
    return lambda x, y: kernel(x, y, kept.scale, kept.zero_point)


def _multiply(step: Step, kept: ValueRange) -> Function:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate, value = sorted((x, y), key=torch.numel)  # the result has the first one's layout
        return QUANTIZED.mul.default(value, gate, kept.scale, kept.zero_point)

    return run


def _concatenate(step: Step, kept: ValueRange) -> Function:
    return lambda *values: QUANTIZED.cat.default(values, 1, kept.scale, kept.zero_point)


def _max_pool(step: Step, kept: ValueRange) -> Function:
    a = step.operation.attributes
    settings = [*(list(a[key]) for key in ("kernel", "stride", "padding", "dilation")), a["ceil"]]
    return lambda x: ATEN.max_pool2d.default(x, *settings)


def _average_pool(step: Step, kept: ValueRange) -> Function:
    a = step.operation.attributes
    settings = [*(list(a[key]) for key in ("kernel", "stride", "padding")), a["ceil"]]
    return lambda x: ATEN.avg_pool2d.default(x, *settings, a["count_padding"])


def _adaptive_pool(step: Step, kept: ValueRange) -> Function:
    size = list(step.operation.attributes["size"])
    return lambda x: ATEN.adaptive_avg_pool2d.default(x, size)


def _global_pool(step: Step, kept: ValueRange) -> Function:
    if step.operation.attributes["keep"]:
        return lambda x: ATEN.adaptive_avg_pool2d.default(x, [1, 1])
    return lambda x: ATEN.flatten.using_ints(ATEN.adaptive_avg_pool2d.default(x, [1, 1]), 1)


def _flatten(step: Step, kept: ValueRange) -> Function:
    return lambda x: ATEN.flatten.using_ints(x, 1)


def _reshape(step: Step, kept: ValueRange) -> Function:
    shape = [-1, *step.operation.attributes["shape"]]  # of a batch of any size
    return lambda x: ATEN.reshape.default(x, shape)


def _permute(step: Step, kept: ValueRange) -> Function:
    order = list(step.operation.attributes["order"])
    return lambda x: ATEN.permute.default(x, order)


def _slice(step: Step, kept: ValueRange) -> Function:
    def run(x: torch.Tensor) -> torch.Tensor:
        for part in step.operation.attributes["parts"]:
            x = ATEN.slice.Tensor(x, *part)
        return x

    return run


def _pad(step: Step, kept: ValueRange) -> Function:
    padding = list(step.operation.attributes["padding"])
    return lambda x: ATEN.constant_pad_nd.default(x, padding, 0.0)


def _activation(kernel: Function) -> Callable[[Step, ValueRange], Function]:
    return lambda step, kept: lambda x: kernel(x, kept.scale, kept.zero_point)


# They look a level up, or compute it from the real value, in one pass.
ACTIVATION_KERNELS = {
    "hardswish": _activation(QUANTIZED.hardswish.default),
    "sigmoid": _activation(QUANTIZED.sigmoid.default),
}
KERNELS: dict[str, Callable[[Step, ValueRange], Function]] = {
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
