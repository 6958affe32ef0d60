"""Runs INT8 networks in torch's quantized kernels.

Only this module and ``kernels`` know torch's quantized tensors. TorchScript is known here alone.
"""

import functools
import sys
import threading
import warnings

import torch

from common.network.graph import ACTIVATIONS, INPUT, LINEAR
from quantization.int8.engines import kernels
from quantization.int8.engines.base import Call, Int8Model, PreparedSizes, Program, Run
from quantization.int8.engines.kernels import QUANTIZED, Function
from quantization.int8.fusion import FusedOperation, fuse_additions, may_overwrite
from quantization.int8.network import CLIPS, Int8Network

FUSES_ADDITIONS = "onednn"  # the engine whose convolutions can add
# Engines that run depthwise convolutions in fbgemm, whose kernel for them adds products in 16 bits,
# even on CPUs with VNNI: large sums saturate. oneDNN's are exact.
SATURATES_DEPTHWISE = ("fbgemm", "x86")
# Kernels of oneDNN are made for a shape; x86 calls oneDNN or fbgemm, whichever it takes to be
# faster for a layer.
PREPARES_SIZES = ("x86", "onednn")
# A packed weight that goes from Python to a kernel costs 8 µs, since torch finds out its class at
# each call. At batch 1 that is a tenth of the time, which a TorchScript trace saves.
CAN_TRACE = sys.version_info < (3, 14) and hasattr(torch, "jit")
NO_KERNEL = "no integer kernel in torch: computed between a dequantize and a quantize"
DEPRECATIONS = "torch.quantize_per_tensor|`torch.jit"
_preparing = threading.Lock()  # traces in two threads at once can crash


class TorchRunner(Int8Model):
    """Runs an INT8 network on one of torch's engines, which is set during a call alone."""

    def __init__(self, network: Int8Network, engine: str):
        super().__init__(network, engine)
        self._programs, self._using = PreparedSizes(self._prepare), UsingEngine(engine)
        self._steps, self._fp32 = network.steps(), network.fp32_part()
        if engine == FUSES_ADDITIONS:
            self._steps = fuse_additions(self._steps, network.graph, self._can_add)

    @property
    def fp32_operations(self) -> dict[str, str]:
        """The operations that do not run on integers, each with the reason."""
        found = super().fp32_operations
        for step in self._steps:
            is_activation = step.operation.kind in ACTIVATIONS
            if is_activation and kernels.kernel_of(step, None, self.engine) is None:
                found[step.name] = NO_KERNEL
        return found

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        program = self._programs[len(images) if self.engine in PREPARES_SIZES else None]
        with self._using:
            return program(images.contiguous(memory_format=torch.channels_last))

    def _prepare(self, size: int | None) -> Run:
        with _preparing, warnings.catch_warnings():
            warnings.filterwarnings("ignore", DEPRECATIONS)
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                program = Program(self._calls()).eval()
                shape = (size or 1, *self._shape)
                example = torch.zeros(shape, dtype=torch.float32, device="cpu")
                example = example.contiguous(memory_format=torch.channels_last)
                with self._using:
                    if CAN_TRACE:
                        return torch.jit.trace(program, example, check_trace=False)
                    program(example)
                    return program

    def _calls(self) -> list[Call]:
        """Return the kernel calls in execution order; the first takes the images."""
        # Weights are packed anew: a packed one keeps the oneDNN kernel of the first shape it meets.
        return [self._call(step) for step in self._steps]

    def _can_add(self, step: FusedOperation, added: str) -> bool:
        """Return whether a convolution can add a value: both in INT8, of one shape."""
        is_int8 = self.network.is_int8(step.operation) and added in self.network.ranges
        return is_int8 and self.network.shapes[step.name] == self.network.shapes[added]

    def _call(self, step: FusedOperation) -> Call:
        operation, kept = step.operation, self.network.ranges.get(step.name)
        if operation.kind == INPUT:
            return Call(step.name, functools.partial(kernels.store, kept=kept), (step.name,))
        if operation.is_layer and self.network.is_int8(operation):
            return self._layer(step)
        kernel = kernels.kernel_of(step, kept, self.engine)
        if kernel is not None and self.network.is_int8(operation):
            return Call(step.name, kernels.clipped(kernel, step, kept), step.inputs)
        return self._in_fp32(step)

    def _layer(self, step: FusedOperation) -> Call:
        """Return the call of an INT8 convolution or linear layer."""
        kept, packed, kernel = self.network.ranges[step.name], self._pack(step), _layer_kernel(step)
        copies = step.added is not None and not may_overwrite(step, self._steps)

        def run(value: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
            if copies:  # the kernel writes its result over what it adds
                added = [x.clone(memory_format=torch.channels_last) for x in added]
            return kernel(value, *added, packed, kept.scale, kept.zero_point)

        return Call(step.name, kernels.clipped(run, step, kept), step.inputs, (packed,))

    def _pack(self, step: FusedOperation) -> object:
        """Pack a layer's weights for the engine that runs it."""
        operation, engine = step.operation, self.engine
        layer = self.network.layers[operation.name]
        scale = self.network.ranges[step.inputs[0]].scale
        bias = (layer.bias_levels(scale) * scale * layer.scales.double()).float()
        zeros = torch.zeros_like(layer.scales, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight, layer.scales.double(), zeros, 0
        )
        if operation.kind == LINEAR:
            with UsingEngine(engine):
                return QUANTIZED.linear_prepack.default(weight, bias)
        groups = operation.attributes["groups"]
        is_depthwise = groups == len(layer.weight) and layer.weight.shape[1] == 1
        if is_depthwise and engine in SATURATES_DEPTHWISE:
            engine = "onednn" if "onednn" in torch_engines() else engine
        with UsingEngine(engine):
            return QUANTIZED.conv2d_prepack.default(weight, bias, *operation.arguments)

    def _in_fp32(self, step: FusedOperation) -> Call:
        """Return a call that computes a step from real values."""
        operation, kept = step.operation, self.network.ranges.get(step.name)
        layer, clip = self._fp32.layers.get(operation.name), CLIPS[step.activation]

        def run(*values: torch.Tensor) -> torch.Tensor:
            real = [value.dequantize() if value.is_quantized else value for value in values]
            return kernels.store(clip(self._fp32.compute(operation, real)), kept)

        constants = () if layer is None else (layer.weight, layer.bias)
        return Call(step.name, run, step.inputs, constants)


def _layer_kernel(step: FusedOperation) -> Function:
    has_relu = step.activation is not None
    if step.operation.kind == LINEAR:
        return (QUANTIZED.linear_relu if has_relu else QUANTIZED.linear).default
    if step.added is not None:
        return (QUANTIZED.conv2d_add_relu if has_relu else QUANTIZED.conv2d_add).default
    return (QUANTIZED.conv2d_relu if has_relu else QUANTIZED.conv2d).new


def torch_engines() -> list[str]:
    """Return the names of the engines that this torch has on this CPU."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


class UsingEngine:
    """Context in which ``torch.backends.quantized.engine`` is set; then it is what it was before.

    Threads that use the same engine run at the same time; one that needs another waits for them.
    A thread may not enter the context of another engine within it.
    """

    _lock = threading.Lock()  # faster than a condition's own
    _is_free = threading.Condition(_lock)
    _current, _before, _users = "", "", 0

    def __init__(self, engine: str):
        self._engine = engine

    def __enter__(self) -> None:
        switch = UsingEngine
        with switch._lock:
            while switch._users and switch._current != self._engine:
                switch._is_free.wait()
            if not switch._users:
                switch._current, switch._before = self._engine, torch.backends.quantized.engine
                if switch._current != switch._before:
                    torch.backends.quantized.engine = switch._current
            switch._users += 1

    def __exit__(self, *_: object) -> None:
        switch = UsingEngine
        with switch._lock:
            switch._users -= 1
            if not switch._users:
                if switch._current != switch._before:
                    torch.backends.quantized.engine = switch._before
                switch._is_free.notify_all()
