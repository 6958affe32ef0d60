"""Engines, torch's families of INT8 kernels: which this CPU has, which to use, and using one."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Iterator

import torch

from common.command import cli
from common.command.cli import UserError
from common.machine import device
from quantization.settings import ENGINES, Settings

# Those whose kernels add pairs of 8-bit products in 16 bits without VNNI.
SATURATING_ENGINES = ("fbgemm", "x86", "onednn")
TORCH_WARNINGS = (
    "torch.ao.quantization is deprecated",
    "Please use quant_min and quant_max",
    "torch.quantize_per_tensor, torch.quantize_per_channel",
    "TypedStorage is deprecated",
    "must run observer before calling calculate_qparams",
    "`torch.jit",
)


def choose_settings(
    engine: str, observer: str = "histogram", reduce_range: str = "auto"
) -> Settings:
    """Return settings for the CPU at hand.

    Args:
        engine: One of ``ENGINES``.
        observer: One of ``OBSERVERS``.
        reduce_range: ``on``, ``off``, or ``auto``: on where products would saturate.

    Raises:
        UserError: torch has no such engine on this CPU.
    """
    require_engine(engine)
    reduced = saturates(engine) if reduce_range == "auto" else reduce_range == "on"
    return Settings(engine, reduced, observer)


def require_engine(engine: str) -> None:
    """Check that torch has an engine on this CPU.

    Raises:
        UserError: It has not; says which it has.
    """
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        available = ", ".join(sorted(set(supported) - {"none"}))
        raise UserError(
            f"torch has no {engine} engine on this {platform.machine()} CPU; it has: {available}"
        )


def saturates(engine: str) -> bool:
    """Return whether sums of 8-bit products saturate on the CPU at hand, so that 7 bits are due."""
    return engine in SATURATING_ENGINES and not device.has_vnni()


def candidate_engines() -> list[str]:
    """Return the engines worth measuring on this CPU; qnnpack, made for Arm, only where alone."""
    supported = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
    return [name for name in supported if name != "qnnpack"] or supported


def fastest_engine() -> str:
    """Return the engine that is the fastest on this CPU.

    Raises:
        UserError: torch has none here.
    """
    candidates = candidate_engines()
    if not candidates:
        raise UserError(f"torch has no INT8 engine on this {platform.machine()} CPU")
    return candidates[-1]


def default_engines() -> list[str]:
    """Return fbgemm; where torch is built without it, as for Arm, what it has, said in one line."""
    supported = torch.backends.quantized.supported_engines
    if "fbgemm" in supported:
        return ["fbgemm"]
    engine = "qnnpack" if "qnnpack" in supported else fastest_engine()
    cli.log.info("torch has no fbgemm on this %s CPU: using %s", platform.machine(), engine)
    return [engine]


@contextlib.contextmanager
def quiet_torch(engine: str | None = None) -> Iterator[None]:
    """Silence torch's named warnings about quantization and, if given, choose the engine."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine or previous
    try:
        with warnings.catch_warnings():
            for message in TORCH_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.backends.quantized.engine = previous


class TorchRunner:
    """Runs a network in torch's quantized kernels; stands in until the engines are there."""

    def __init__(self, network, engine):
        import torch as t

        self.network, self.engine = network, engine
        self.reference = None
        self.packed = {}
        previous = t.backends.quantized.engine
        t.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in network.steps():
                op = step.operation
                if not op.is_layer or not network.is_int8(op):
                    continue
                layer, s = network.layers[op.name], network.ranges[step.inputs[0]].scale
                w = t._make_per_channel_quantized_tensor(
                    layer.weight,
                    layer.scales.double(),
                    t.zeros(len(layer.scales), dtype=t.int64),
                    0,
                )
                bias = (layer.bias_levels(s) * s * layer.scales.double()).float()
                if layer.weight.ndim == 2:
                    self.packed[op.name] = t.ops.quantized.linear_prepack(w, bias)
                else:
                    a = op.attributes
                    self.packed[op.name] = t.ops.quantized.conv2d_prepack(
                        w, bias, a["stride"], a["padding"], a["dilation"], a["groups"]
                    )
        t.backends.quantized.engine = previous

    @torch.inference_mode()
    def __call__(self, images):
        from quantization.int8.reference import ReferenceRunner

        if self.reference is None:
            self.reference = ReferenceRunner(self.network)
        ref, net = self.reference, self.network
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.engine

        def compute(operation, inputs):
            step = ref._steps[operation.name]
            op = step.operation
            kept = net.ranges.get(step.name)
            if op.is_layer and net.is_int8(op):
                x, act = inputs[0], step.activation
                kind = "conv2d" if op.kind == "convolution" else "linear"
                call = getattr(torch.ops.quantized, kind + ("_relu" if act else ""))
                y = call(x, self.packed[op.name], kept.scale, kept.zero_point)
                high = kept.clip_levels(act)[1]
                if high < 255:
                    y = torch.clamp(y, max=6.0)
                return y
            if op.kind == "add" and not (step.activation == "relu6"):
                call = torch.ops.quantized.add_relu if step.activation else torch.ops.quantized.add
                return call(*inputs, kept.scale, kept.zero_point)
            levels = [
                x.int_repr().double() - x.q_zero_point() if x.is_quantized else x for x in inputs
            ]
            return pack(step, ref._compute(operation, levels))

        def pack(step, value):
            kept = net.ranges.get(step.name)
            if kept is None:
                return value
            value = (value + kept.zero_point).nan_to_num().to(torch.uint8)
            if value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            return torch._make_per_tensor_quantized_tensor(value, kept.scale, kept.zero_point)

        from common.network.graph import evaluate

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, out = ref._steps[ref._graph.input], ref._graph.output
            given = {first.name: pack(first, ref._store(first, images))}
            y = evaluate(ref._graph, compute, given, [out])[out]
        torch.backends.quantized.engine = previous
        return y.dequantize() if y.is_quantized else y


def runner(name, network):
    """Stand-in."""
    if name == "reference":
        from quantization.int8.reference import ReferenceRunner

        return ReferenceRunner(network)
    return TorchRunner(network, name)


def fp32_runner(network):
    """Stand-in."""
    return network
