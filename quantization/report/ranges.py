"""The ranges that INT8 has to cover: of the weights, by channel, and of the activations, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.fx import GraphModule

from common.network.resnet import ResNet18, fold_batch_norm, prunable_layers
from common.report import results as report
from quantization.accuracy.quantizers import quantizer_of
from quantization.int8.conversion import activation_observers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ActivationRange(NamedTuple):
    """The range of one observed activation, and what the observer chose to keep of it."""

    name: str
    seen_min: float
    seen_max: float
    kept_min: float
    kept_max: float


class ChannelRanges(NamedTuple):
    """The largest weight magnitude of each output channel of a layer: its spread over channels."""

    layer: str
    low: float
    median: float
    high: float


def activation_ranges(observed: GraphModule) -> list[ActivationRange]:
    """Return the range of every activation that calibration observed, in network order."""
    sources = {}  # pooling and flattening share the observer of what they read
    for node, observer in activation_observers(observed):
        sources.setdefault(observer, node.args[0])
    ranges = []
    for observer, node in sources.items():
        name = node.target if node.op == "call_module" else node.name
        seen = float(observer.min_val), float(observer.max_val)
        kept = quantizer_of(observer).limits
        ranges.append(ActivationRange("input" if node.op == "placeholder" else name, *seen, *kept))
    return ranges


def weight_ranges(model: ResNet18) -> list[ChannelRanges]:
    """Return the spread of weight ranges over channels, by layer; batch-norms are folded."""
    ranges = []
    for name, module in prunable_layers(model).items():
        largest = module.weight.detach().abs().flatten(1).amax(dim=1)
        spread = (largest.min(), largest.median(), largest.max())
        ranges.append(ChannelRanges(name, *map(float, spread)))
    return ranges


def plot_ranges(model: ResNet18, observed: GraphModule, path: Path) -> None:
    """Plot the ranges of an FP32 model's weights, and of its activations as ``observed``."""
    figure, axes = report.new_figure(11, 6.2, columns=2, width_ratios=(1, 1.25))
    _plot_weights(axes[0], weight_ranges(fold_batch_norm(model)))
    _plot_activations(axes[1], activation_ranges(observed))
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=8)
    report.save_figure(figure, path)


def _plot_weights(axis: Axes, weights: Sequence[ChannelRanges]) -> None:
    rows = np.arange(len(weights))
    low, high = [w.low for w in weights], [w.high for w in weights]
    axis.hlines(rows, low, high, color=report.BLUE, lw=5, alpha=0.35, label="all channels")
    axis.plot([w.median for w in weights], rows, "o", color=report.BLUE, label="median")
    axis.set_yticks(rows, [w.layer for w in weights])
    axis.set(title="Weights: largest magnitude by channel", xlabel="with batch-norm folded in")
    if any(high):  # a network of zeros has no place on a logarithmic scale
        axis.set(xlabel="with batch-norm folded in; log scale", xscale="log")


def _plot_activations(axis: Axes, activations: Sequence[ActivationRange]) -> None:
    rows = np.arange(len(activations))
    axis.hlines(
        rows, [a.seen_min for a in activations], [a.seen_max for a in activations],
        color=report.GREY, lw=2, label="seen in calibration",
    )  # fmt: skip
    axis.hlines(
        rows, [a.kept_min for a in activations], [a.kept_max for a in activations],
        color=report.ORANGE, lw=6, alpha=0.8, label="kept by INT8 (clipped beyond)",
    )  # fmt: skip
    axis.set_yticks(rows, [a.name for a in activations])
    axis.set(title="Activations: range by layer", xlabel="value")
