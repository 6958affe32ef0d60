"""The ranges that INT8 has to cover: of the weights, by channel, and of the activations, drawn."""

from pathlib import Path

from common.network.execution import Network
from common.network.graph import INPUT
from common.report import results as report
from quantization.int8.conversion import Observation
from quantization.int8.network import SAME_RANGE, fuse_activations


def activation_ranges(
    observation: Observation, reduce_range: bool
) -> dict[str, tuple[float, float, float, float]]:
    """Return the range of every value that calibration observed, in network order.

    By name the least and the greatest value that was seen, and those that INT8 keeps.
    """
    chosen, ranges = observation.ranges(reduce_range), {}
    for step in fuse_activations(observation.network.graph):
        if step.operation.kind not in SAME_RANGE:
            observer, kept = observation.observers[step.name], chosen[step.name]
            name = "input" if step.operation.kind == INPUT else step.operation.name
            ranges[name] = (observer.low, observer.high, *kept.limits)
    return ranges


def weight_ranges(network: Network) -> dict[str, tuple[float, float, float]]:
    """Return the spread over output channels of their largest weight magnitudes, by layer.

    The least, the median and the greatest.
    """
    ranges = {}
    for name in network.graph.layers:
        largest = network.layers[name].weight.detach().abs().flatten(1).amax(dim=1)
        ranges[name] = (float(largest.min()), float(largest.median()), float(largest.max()))
    return ranges


def plot_ranges(observation: Observation, reduce_range: bool, path: Path) -> None:
    """Plot the ranges of a network's weights, and of its values as they were observed."""
    weights = weight_ranges(observation.network)
    activations = activation_ranges(observation, reduce_range)
    figure, (left, right) = report.new_figure(11, 6.2, columns=2, width_ratios=(1, 1.25))
    low, median, high = zip(*weights.values(), strict=True)
    rows = range(len(weights))
    left.hlines(rows, low, high, color=report.BLUE, lw=5, alpha=0.35, label="all channels")
    left.plot(median, rows, "o", color=report.BLUE, label="median")
    left.set(title="Weights: largest magnitude by channel", xlabel="with batch-norm folded in")
    if any(high):  # a network of zeros has no place on a logarithmic scale
        left.set(xlabel="with batch-norm folded in; log scale", xscale="log")
    rows = range(len(activations))
    seen_low, seen_high, kept_low, kept_high = zip(*activations.values(), strict=True)
    right.hlines(rows, seen_low, seen_high, color=report.GREY, lw=2, label="seen in calibration")
    right.hlines(
        rows, kept_low, kept_high, color=report.ORANGE, lw=6, alpha=0.8,
        label="kept by INT8 (clipped beyond)",
    )  # fmt: skip
    right.set(title="Activations: range by layer", xlabel="value")
    for axis, names in ((left, weights), (right, activations)):
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=8)
    report.save_figure(figure, path)
