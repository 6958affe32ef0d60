"""The ranges that INT8 has to cover: of the weights, by channel, and of the activations, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.fx import GraphModule, Node

from common.network.resnet import ResNet18, fold_batch_norm, prunable_layers
from common.report import results as report
from quantization.accuracy.quantizers import quantizer_of
from quantization.int8.conversion import activation_observers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def activation_ranges(observed: GraphModule) -> list[ActivationRange]:
    """Return the range of every activation that calibration observed, in network order."""
    ranges, shared = [], set()
    for node, observer in activation_observers(observed):
        if observer in shared:  # pooling and flattening share that of what they read
            continue
        shared.add(observer)
        kept_min, kept_max = quantizer_of(observer).limits
        ranges.append(
            ActivationRange(
                name=_producer_name(node.args[0]),
                seen_min=float(observer.min_val),
                seen_max=float(observer.max_val),
                kept_min=kept_min,
                kept_max=kept_max,
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


def _producer_name(node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    return node.target if node.op == "call_module" else node.name


def plot_ranges(model: ResNet18, observed: GraphModule, path: Path) -> None:
    """Plot the ranges that INT8 has to cover: of weights by channel, of activations by layer.

    Args:
        model: FP32, as it was quantized.
        observed: The same calibrated.
        path: PNG to write.
    """
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
