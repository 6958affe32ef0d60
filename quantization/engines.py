"""INT8 post-training static quantization: the one module that knows ``torch.ao``.

``torch.ao.quantization`` is deprecated but still the only way in torch to a real, saved and
reloadable INT8 model for the CPU. The names it needs, the warnings it prints and the private
corners of it are all here, so that its successor can take its place in one file.

The steps are those of Jacob et al. (2018, https://arxiv.org/abs/1712.05877): fuse batch-norm into
the convolutions, observe the range of every activation on calibration images, then replace each
operation by its INT8 kernel with those ranges fixed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import platform
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from common import cli, report
from common.cli import UserError
from common.model import ResNet18, prunable_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.ao.quantization import (
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        QConfig,
        QConfigMapping,
        default_per_channel_weight_observer,
    )
    from torch.ao.quantization.fx.utils import assert_and_get_unique_device
    from torch.ao.quantization.observer import ObserverBase
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")


class PercentileObserver(HistogramObserver):
    """Keeps the values between two percentiles of all that was seen, and clips the rest."""

    CLIPPED_FRACTION = 1e-4  # at each end

    def _non_linear_param_search(self) -> tuple[torch.Tensor, torch.Tensor]:
        # The one method of the base class that chooses the range from the histogram.
        shares = self.histogram.cumsum(0) / self.histogram.sum()
        edges = torch.linspace(float(self.min_val), float(self.max_val), self.bins + 1)
        low = edges[int((shares <= self.CLIPPED_FRACTION).sum())]
        high = edges[int((shares < 1 - self.CLIPPED_FRACTION).sum()) + 1]
        return low, high


OBSERVERS = {
    "histogram": HistogramObserver,  # clips where the expected squared error is least
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageMinMaxObserver,
    "percentile": PercentileObserver,
}
# Those of the x86 engines' kernels that add pairs of 8-bit products in 16 bits without VNNI.
SATURATING_ENGINES = ("fbgemm", "x86")
TORCH_WARNINGS = (
    "torch.ao.quantization is deprecated",
    "Please use quant_min and quant_max",
    "torch.quantize_per_tensor, torch.quantize_per_channel",
    "TypedStorage is deprecated",
    "must run observer before calling calculate_qparams",
    "`torch.jit",
)


@dataclass(frozen=True)
class Settings:
    """How a model is quantized; kept in the artefact, for loading needs the same again.

    Attributes:
        engine: One of ``ENGINES``.
        observer: How activations' ranges follow from what was seen, one of ``OBSERVERS``.
        fp32_layers: Convolution and linear layers that stay in FP32.
        reduce_range: Use 7 of the 8 bits of activations, which x86 CPUs without VNNI need: there
            the sum of two full products does not fit the 16 bits that it is added in.
    """

    engine: str = "fbgemm"
    reduce_range: bool = False
    observer: str = "histogram"
    fp32_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ActivationRange:
    """The range of one observed activation, and what the observer chose to keep of it."""

    name: str
    seen_min: float
    seen_max: float
    kept_min: float
    kept_max: float


@dataclass(frozen=True)
class ChannelRanges:
    """The largest weight magnitude of each output channel of a layer: its spread over channels."""

    layer: str
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Operation:
    """One operation of a converted model: its name, what it is, and whether it runs in INT8."""

    name: str
    kind: str
    is_int8: bool


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
    if engine not in torch.backends.quantized.supported_engines:
        available = ", ".join(sorted(set(torch.backends.quantized.supported_engines) - {"none"}))
        raise UserError(
            f"torch has no {engine} engine on this {platform.machine()} CPU; it has: {available}"
        )
    saturates = engine in SATURATING_ENGINES and not report.has_vnni()
    return Settings(engine, saturates if reduce_range == "auto" else reduce_range == "on", observer)


def candidate_engines() -> list[str]:
    """Return the engines worth measuring on this CPU; qnnpack, made for Arm, only where alone."""
    supported = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
    return [name for name in supported if name != "qnnpack"] or supported


def default_engines() -> list[str]:
    """Return fbgemm; where torch is built without it, as for Arm, what it has, said in one line."""
    supported = torch.backends.quantized.supported_engines
    if "fbgemm" in supported:
        return ["fbgemm"]
    engine = "qnnpack" if "qnnpack" in supported else candidate_engines()[0]
    cli.log.info("torch has no fbgemm on this %s CPU: using %s", platform.machine(), engine)
    return [engine]


def calibrate(
    model: ResNet18,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
) -> GraphModule:
    """Return a copy of ``model`` that has observed its activations on the calibration images.

    Args:
        model: FP32, in eval mode, on the CPU; left as it is.
        batches: Normalised images (N, 3, 32, 32) and labels, which are not used.
        settings: Of the quantization.
    """
    with quiet_torch(settings.engine):
        observed = _prepare(model, settings)
        with torch.inference_mode():
            for images, _ in cli.progress(batches, "calibrate"):
                observed(images)
        return observed


def reuse_ranges(observed: GraphModule, model: ResNet18, settings: Settings) -> GraphModule:
    """Return ``model`` calibrated for other ``fp32_layers`` with the ranges already observed.

    Args:
        observed: A calibrated form of the same model, with the same observer; left as it is.
        model: FP32, in eval mode.
        settings: Of the quantization.
    """
    known = {node.args[0].name: observer for node, observer in _observers(observed)}
    with quiet_torch(settings.engine):
        prepared = _prepare(model, settings)
    for node, _ in _observers(prepared):
        prepared.set_submodule(node.target, known[node.args[0].name])
    return prepared


def convert(observed: GraphModule, settings: Settings) -> GraphModule:
    """Return the INT8 model of a calibrated one, which is left as it is.

    Biases are rounded to the INT32 steps in which products are summed. torch's kernels would take
    them in FP32, other runtimes cannot; rounded, all of them compute the same.

    Raises:
        RuntimeError: An operation would not run in INT8, though no setting keeps it in FP32.
    """
    with quiet_torch(settings.engine), torch.inference_mode(), _models_forgotten():
        converted = convert_fx(copy.deepcopy(observed))
        _BiasRounder(converted).run(torch.zeros(1, 3, 32, 32))
    refused = {op.name for op in list_operations(converted) if not op.is_int8}
    if refused := sorted(refused - set(settings.fp32_layers)):
        raise RuntimeError(f"not INT8 after conversion: {', '.join(refused)}")
    return converted


def build_skeleton(settings: Settings) -> GraphModule:
    """Return an INT8 model of the right structure with meaningless weights, to load a state into.

    Raises:
        UserError: torch has no such engine on this CPU.
    """
    choose_settings(settings.engine)
    with quiet_torch(settings.engine), _models_forgotten():
        return convert_fx(_prepare(ResNet18().eval(), settings))


def list_operations(converted: GraphModule) -> list[Operation]:
    """List what a converted model runs between its first quantize and its last dequantize.

    The model is run on a blank image, and an operation is INT8 if what it returned is: the proof
    does not rest on the names of classes.
    """
    recorder = _Recorder(converted)
    with torch.inference_mode():
        recorder.run(torch.zeros(1, 3, 32, 32))
    return recorder.operations


class _BiasRounder(torch.fx.Interpreter):
    """Runs a graph node by node and rounds the bias of every INT8 layer that it meets."""

    def run_node(self, node: torch.fx.Node) -> object:
        module = self.fetch_attr(node.target) if node.op == "call_module" else None
        if hasattr(module, "set_weight_bias"):
            (image, *_), _ = self.fetch_args_kwargs_from_env(node)
            weight, bias = module.weight(), module.bias().double()
            steps = image.q_scale() * weight.q_per_channel_scales().double()
            module.set_weight_bias(weight, ((bias / steps).round() * steps).float())
        return super().run_node(node)


class _Recorder(torch.fx.Interpreter):
    """Runs a graph node by node and notes which nodes computed on INT8."""

    def __init__(self, module: GraphModule):
        super().__init__(module)
        self.operations: list[Operation] = []

    def run_node(self, node: torch.fx.Node) -> object:
        result = super().run_node(node)
        is_boundary = node.target in (torch.quantize_per_tensor, "dequantize")
        if node.op.startswith("call_") and not is_boundary:
            kind = getattr(node.target, "__name__", str(node.target))
            if node.op == "call_module":
                kind = type(self.fetch_attr(node.target)).__name__
            name = node.target if node.op == "call_module" else node.name
            self.operations.append(Operation(name, kind, result.is_quantized))
        return result


def activation_ranges(observed: GraphModule) -> list[ActivationRange]:
    """Return the range of every activation that calibration observed, in network order."""
    ranges, shared = [], set()
    for node, observer in _observers(observed):
        if observer in shared:  # pooling and flattening share that of what they read
            continue
        shared.add(observer)
        with quiet_torch():
            scale, zero_point = observer.calculate_qparams()
        ranges.append(
            ActivationRange(
                name=_producer_name(node.args[0]),
                seen_min=float(observer.min_val),
                seen_max=float(observer.max_val),
                kept_min=float((observer.quant_min - zero_point) * scale),
                kept_max=float((observer.quant_max - zero_point) * scale),
            )
        )
    return ranges


def weight_ranges(model: ResNet18) -> list[ChannelRanges]:
    """Return the spread of weight ranges over channels, by layer, as INT8 sees it.

    Args:
        model: FP32 with batch-norm folded in.
    """
    ranges = []
    for name, module in prunable_layers(model).items():
        largest = module.weight.detach().abs().flatten(1).amax(dim=1)
        spread = (float(value) for value in (largest.min(), largest.median(), largest.max()))
        ranges.append(ChannelRanges(name, *spread))
    return ranges


def _observers(observed: GraphModule) -> list[tuple[torch.fx.Node, ObserverBase]]:
    """Return the nodes that observe an activation, each with its observer."""
    calls = [node for node in observed.graph.nodes if node.op == "call_module"]
    modules = [(node, observed.get_submodule(node.target)) for node in calls]
    return [(node, module) for node, module in modules if isinstance(module, ObserverBase)]


def _producer_name(node: torch.fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    return node.target if node.op == "call_module" else node.name


def _prepare(model: ResNet18, settings: Settings) -> GraphModule:
    quant_max = 127 if settings.reduce_range else 255
    activation = OBSERVERS[settings.observer].with_args(
        dtype=torch.quint8, quant_min=0, quant_max=quant_max
    )
    qconfig = QConfig(activation=activation, weight=default_per_channel_weight_observer)
    mapping = QConfigMapping().set_global(qconfig)
    for layer in settings.fp32_layers:
        mapping.set_module_name(layer, None)
    example = torch.zeros(1, 3, 32, 32)
    with _models_forgotten():
        return prepare_fx(
            copy.deepcopy(model).to(memory_format=torch.channels_last),
            mapping,
            (example,),
        )


@dataclass(frozen=True)
class Quantizer:
    """Rounds an activation to its 8-bit grid, in FP32: what INT8 makes of it."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` rounded; same shape, FP32."""
        # torch.fake_quantize_per_tensor_affine computes the same, but 30 times slower.
        low, high = self.quant_min - self.zero_point, self.quant_max - self.zero_point
        return (x * (1 / self.scale)).round_().clamp_(low, high).mul_(self.scale)


def layer_quantizers(observed: GraphModule) -> dict[str, tuple[Quantizer, Quantizer]]:
    """Return the quantizers of every layer's input and output, from a calibrated model."""
    quantizers = {}
    for node, observer in _observers(observed):
        with quiet_torch():
            scale, zero_point = observer.calculate_qparams()
        quantizers[node] = Quantizer(
            float(scale), int(zero_point), observer.quant_min, observer.quant_max
        )
    found = {}
    for node in observed.graph.nodes:
        if node.op == "call_module" and _is_layer(observed.get_submodule(node.target)):
            read, write = node.args[0], next(user for user in node.users if user in quantizers)
            found[node.target] = (quantizers[read], quantizers[write])
    return found


def quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` (out, ...) rounded to its INT8 grid, one scale an output channel; FP32."""
    observer = default_per_channel_weight_observer()
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    return torch.fake_quantize_per_channel_affine(
        weight, scale, zero_point.int(), 0, observer.quant_min, observer.quant_max
    )


def _is_layer(module: nn.Module) -> bool:
    # A fused convolution is a Sequential of the convolution and its ReLU.
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    return isinstance(first, nn.Conv2d | nn.Linear)


@contextlib.contextmanager
def _models_forgotten() -> Iterator[None]:
    """Free the models that ``torch.ao`` met on its way: 45 MB each.

    It keeps them in a cache; and graphs are cycles, which Python would free by their number only.
    """
    try:
        yield
    finally:
        assert_and_get_unique_device.cache_clear()
        gc.collect()


@contextlib.contextmanager
def quiet_torch(engine: str | None = None) -> Iterator[None]:
    """Silence the named warnings of ``torch.ao`` and, if given, choose the engine."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine or previous
    try:
        with warnings.catch_warnings():
            for message in TORCH_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.backends.quantized.engine = previous
