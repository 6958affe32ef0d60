"""The steps of an INT8 network as calls of torch's quantized kernels."""

import functools

import torch

from common.network.graph import INPUT, LINEAR
from quantization.int8.engines.kernels import QUANTIZED, Function, clipped, kernel_of, store
from quantization.int8.engines.program import Call, may_overwrite
from quantization.int8.engines.switch import UsingEngine, torch_engines
from quantization.int8.fusion import FusedOperation, fuse_additions
from quantization.int8.network import CLIPS, Int8Network

FUSES_ADDITIONS = "onednn"  # the engine whose convolutions can add
# Engines that run depthwise convolutions in fbgemm, whose kernel for them adds products in 16 bits,
# even on CPUs with VNNI: large sums saturate. oneDNN's are exact.
SATURATES_DEPTHWISE = ("fbgemm", "x86")


class CallBuilder:
    """Lists the kernel calls of a network; the engine, torch's, must be set while they run."""

    def __init__(self, network: Int8Network, engine: str):
        self._network, self._engine, self._ranges = network, engine, network.ranges
        self._steps = network.steps()
        if engine == FUSES_ADDITIONS:
            self._steps = fuse_additions(self._steps, network.graph, self._can_add)
        self._fp32 = network.fp32_part()

    def build(self) -> list[Call]:
        """Return the calls in execution order; the first takes the images."""
        # Weights are packed anew: a packed one keeps the oneDNN kernel of the first shape it meets.
        return [self._call(step) for step in self._steps]

    def _can_add(self, step: FusedOperation, added: str) -> bool:
        """Return whether a convolution can add a value: both in INT8, of one shape."""
        is_int8 = self._network.is_int8(step.operation) and added in self._ranges
        return is_int8 and self._network.shapes[step.name] == self._network.shapes[added]

    def _call(self, step: FusedOperation) -> Call:
        operation, kept = step.operation, self._ranges.get(step.name)
        if operation.kind == INPUT:
            return Call(step.name, functools.partial(store, kept=kept), (step.name,))
        if operation.is_layer and self._network.is_int8(operation):
            return self._layer(step)
        kernel = kernel_of(step, kept, self._engine)
        if kernel is not None and self._network.is_int8(operation):
            return Call(step.name, clipped(kernel, step, kept), step.inputs)
        return self._in_fp32(step)

    def _layer(self, step: FusedOperation) -> Call:
        """Return the call of an INT8 convolution or linear layer."""
        kept, packed, kernel = self._ranges[step.name], self._pack(step), _layer_kernel(step)
        copies = step.added is not None and not may_overwrite(step, self._steps)

        def run(value: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
            if copies:  # the kernel writes its result over what it adds
                added = [x.clone(memory_format=torch.channels_last) for x in added]
            return kernel(value, *added, packed, kept.scale, kept.zero_point)

        return Call(step.name, clipped(run, step, kept), step.inputs, (packed,))

    def _pack(self, step: FusedOperation) -> object:
        """Pack a layer's weights for the engine that runs it."""
        operation, engine = step.operation, self._engine
        layer, scale = self._network.layers[operation.name], self._ranges[step.inputs[0]].scale
        bias = (layer.bias_levels(scale) * scale * layer.scales.double()).float()
        zeros = torch.zeros_like(layer.scales, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight, layer.scales.double(), zeros, 0
        )
        if operation.kind == LINEAR:
            with UsingEngine(engine):
                return QUANTIZED.linear_prepack.default(weight, bias)
        settings = operation.attributes
        is_depthwise = settings["groups"] == len(layer.weight) and layer.weight.shape[1] == 1
        if is_depthwise and engine in SATURATES_DEPTHWISE:
            engine = "onednn" if "onednn" in torch_engines() else engine
        with UsingEngine(engine):
            return QUANTIZED.conv2d_prepack.default(
                weight, bias, list(settings["stride"]), list(settings["padding"]),
                list(settings["dilation"]), settings["groups"],
            )  # fmt: skip

    def _in_fp32(self, step: FusedOperation) -> Call:
        """Return a call that computes a step from real values."""
        operation, kept = step.operation, self._ranges.get(step.name)
        layer = self._fp32.layers.get(operation.name)
        clip = CLIPS[step.activation]

        def run(*values: torch.Tensor) -> torch.Tensor:
            real = [value.dequantize() if value.is_quantized else value for value in values]
            return store(clip(self._fp32.compute(operation, real, layer=layer)), kept)

        constants = () if layer is None else (layer.weight, layer.bias)
        return Call(step.name, run, step.inputs, constants)


def _layer_kernel(step: FusedOperation) -> Function:
    has_relu = step.activation is not None
    if step.operation.kind == LINEAR:
        return (QUANTIZED.linear_relu if has_relu else QUANTIZED.linear).default
    if step.added is not None:
        return (QUANTIZED.conv2d_add_relu if has_relu else QUANTIZED.conv2d_add).default
    return (QUANTIZED.conv2d_relu if has_relu else QUANTIZED.conv2d).new
