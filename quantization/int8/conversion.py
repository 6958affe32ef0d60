"""INT8 post-training static quantization: the one module that imports ``torch.ao``.

``torch.ao.quantization`` is deprecated but still the only way in torch to a real, saved and
reloadable INT8 model for the CPU. The names it needs and the private corners of it are all here, so
that its successor can take its place in one file.

The steps are those of Jacob et al. (2018, https://arxiv.org/abs/1712.05877): fuse batch-norm into
the convolutions, observe the range of every activation on calibration images, then replace each
operation by its INT8 kernel with those ranges fixed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from common.command import cli
from common.images.cifar10 import IMAGE_SIZE
from common.network.resnet import ResNet18, Widths
from quantization.int8.engines import quiet_torch, require_engine
from quantization.int8.operations import list_operations, round_biases
from quantization.settings import Settings

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
    from torch.ao.quantization.observer import ObserverBase as Observer
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx


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


ACTIVATION_OBSERVERS = {
    "histogram": HistogramObserver,  # clips where the expected squared error is least
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageMinMaxObserver,
    "percentile": PercentileObserver,
}
WEIGHT_OBSERVER = default_per_channel_weight_observer  # symmetric


def calibrate(
    model: ResNet18, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], settings: Settings
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
    known = {node.args[0].name: observer for node, observer in activation_observers(observed)}
    with quiet_torch(settings.engine):
        prepared = _prepare(model, settings)
    for node, _ in activation_observers(prepared):
        prepared.set_submodule(node.target, known[node.args[0].name])
    return prepared


def activation_observers(observed: GraphModule) -> list[tuple[Node, Observer]]:
    """Return the nodes of a calibrated model that observe an activation, each with its observer."""
    calls = [node for node in observed.graph.nodes if node.op == "call_module"]
    modules = [(node, observed.get_submodule(node.target)) for node in calls]
    return [(node, module) for node, module in modules if isinstance(module, Observer)]


def convert(observed: GraphModule, settings: Settings) -> GraphModule:
    """Return the INT8 model of a calibrated one, which is left as it is; its biases are rounded.

    Raises:
        RuntimeError: An operation would not run in INT8, though no setting keeps it in FP32.
    """
    with quiet_torch(settings.engine), torch.inference_mode(), _frugal():
        converted = convert_fx(copy.deepcopy(observed))
        round_biases(converted)
    refused = {name for name, is_int8 in list_operations(converted).items() if not is_int8}
    if refused := sorted(refused - set(settings.fp32_layers)):
        raise RuntimeError(f"not INT8 after conversion: {', '.join(refused)}")
    return converted


def build_skeleton(settings: Settings, widths: Widths) -> GraphModule:
    """Return an INT8 model of the right structure with meaningless weights, to load a state into.

    Raises:
        UserError: torch has no such engine on this CPU.
    """
    require_engine(settings.engine)
    # The caller's random numbers stay as they are; torch.ao builds modules that draw some as well.
    with quiet_torch(settings.engine), _frugal(), torch.random.fork_rng(devices=[]):
        return convert_fx(_prepare(ResNet18(widths).eval(), settings))


def _prepare(model: ResNet18, settings: Settings) -> GraphModule:
    quant_max = 127 if settings.reduce_range else 255
    activation = ACTIVATION_OBSERVERS[settings.observer].with_args(
        dtype=torch.quint8, quant_min=0, quant_max=quant_max
    )
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=WEIGHT_OBSERVER))
    for layer in settings.fp32_layers:
        mapping.set_module_name(layer, None)
    with _frugal():
        return prepare_fx(
            copy.deepcopy(model).to(memory_format=torch.channels_last),
            mapping,
            (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),),
        )


@contextlib.contextmanager
def _frugal() -> Iterator[None]:
    """Keep ``torch.ao`` from taking a second and 45 MB a model for nothing.

    To tell where each node of a graph came from, torch imports its compiler. The models that it met
    are kept in a cache; and graphs are cycles, which Python would free by their number only.
    """
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
        assert_and_get_unique_device.cache_clear()
        gc.collect()
