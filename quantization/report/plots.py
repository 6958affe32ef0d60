"""The plots of quantization.py: its results, and the ranges that INT8 has to cover."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.images.data import ImageSet
from common.network.execution import Network
from common.network.graph import INPUT
from common.report import figures
from common.report import results as report
from quantization.int8.conversion import Observation
from quantization.int8.fusion import fuse_activations
from quantization.int8.network import SAME_RANGE
from quantization.report.story import label

SHEET_COLUMNS, SHEET_ROWS = 8, 4
TITLE_CHARACTERS = 10  # that fit into an inch of a title
# FP32 twice, seven engines and the ONNX file are the most that one run compares.
COLORS = (
    "#C4C4C4", "#777777", figures.ORANGE, figures.BLUE, figures.GREEN, figures.RED, figures.PURPLE,
    "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip


def plot_overview(models: Sequence[dict], path: Path) -> None:
    """Plot the size, accuracy and throughput of results.json's ``models``."""
    figure, axes = figures.new_figure(11, 3.8, columns=3, width_ratios=(1, 1.15, 2))
    size_axis, accuracy_axis, speed_axis = axes
    colored = list(zip(models, COLORS, strict=False))
    # The layout in memory changes neither size nor accuracy.
    distinct = [(model, color) for model, color in colored if model["name"] != "fp32-nchw"]
    for index, (model, color) in enumerate(distinct):
        size_mb, accuracy = model["size_bytes"] / 1e6, model["accuracy"]
        bar = size_axis.bar(index, size_mb, color=color, width=0.6)
        size_axis.bar_label(bar, [f"{size_mb:.1f}"], padding=2)
        value, low, high = (100 * x for x in (accuracy["value"], *accuracy["ci95"]))
        accuracy_axis.errorbar(
            index, value, [[value - low], [high - value]], fmt="o", color=color, capsize=5, lw=2,
            ms=7,
        )  # fmt: skip
        accuracy_axis.annotate(
            f"{value:.2f}", (index, high), xytext=(0, 4), textcoords="offset points", ha="center",
            fontsize=8.5,
        )  # fmt: skip
    names = [label(model, short=True) for model, _ in distinct]
    for axis in (size_axis, accuracy_axis):
        axis.set_xticks(range(len(names)), names)
        axis.tick_params(axis="x", labelsize=8.5 if len(names) < 4 else min(7, 31 / len(names)))
        axis.margins(y=0.12)  # for the numbers
    images = report.counted(models[0]["accuracy"]["total"], "image")
    size_axis.set(title="Size on disk", ylabel="MB")
    accuracy_axis.set(title="Accuracy, 95 % interval", ylabel=f"top-1 on {images}, %")
    accuracy_axis.set_xlim(-0.5, len(names) - 0.5)
    shown = [(label(model), color, model["latency"]) for model, color in colored]
    figures.draw_rates(speed_axis, shown, padding=3, fontsize=8, rotation=90)
    speed_axis.set_title("Throughput on the CPU")
    speed_axis.margins(y=0.15)  # for the numbers
    speed_axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, fontsize=8)
    figures.save_figure(figure, path, models)


def plot_diagnosis(rows: Sequence[dict], path: Path) -> None:
    """Plot each layer's quantization noise, and what INT8 costs with it alone and without it."""
    figure, (noise_axis, cost_axis) = figures.new_figure(11, 6, columns=2, sharey=True)
    at = np.arange(len(rows))
    worst = min(range(len(rows)), key=lambda index: rows[index]["sqnr_db"])
    colors = [figures.RED if index == worst else figures.BLUE for index in at]
    noise_axis.barh(at, [row["sqnr_db"] for row in rows], color=colors, height=0.65)
    for key, marker, name in (
        ("weight_sqnr_db", "|", "only weights rounded"),
        ("activation_sqnr_db", "x", "only activations rounded"),
    ):
        noise_axis.plot([row[key] for row in rows], at, marker, color="black", ms=6, label=name)
    noise_axis.set_yticks(at, [row["layer"] for row in rows], fontsize=8)
    noise_axis.invert_yaxis()
    noise_axis.set(title="Signal to quantization noise", xlabel="dB; less is worse (worst in red)")
    for offset, key, color, name in (
        (-0.2, "drop_only_quantized", figures.ORANGE, "only this layer in INT8"),
        (0.2, "drop_only_fp32", figures.GREY, "all but this layer in INT8"),
    ):
        changes = [-100 * row[key] for row in rows]
        cost_axis.barh(at + offset, changes, 0.38, color=color, label=name)
    cost_axis.axvline(0, color="black", lw=0.8)
    cost_axis.set(title="Accuracy", xlabel="points against FP32; a loss is negative")
    for axis in (noise_axis, cost_axis):
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)
    figures.save_figure(figure, path)


def plot_flips(dataset: ImageSet, fp32: torch.Tensor, int8: torch.Tensor, path: Path) -> int:
    """Draw images that the two models answer differently: losses, gains, others; return how many.

    Where no answer changes there is nothing to see, and no file is written.
    """
    flipped, labels = (fp32 != int8).nonzero().flatten(), dataset.labels
    if not len(flipped):
        return 0
    kinds = torch.where(fp32 == labels, 0, torch.where(int8 == labels, 1, 2))
    losses, gains, others = kinds[flipped].bincount(minlength=3).tolist()
    by_kind = flipped[kinds[flipped].argsort(stable=True)]
    shown = by_kind[: SHEET_COLUMNS * SHEET_ROWS].tolist()
    rows, columns = -(-len(shown) // SHEET_COLUMNS), min(len(shown), SHEET_COLUMNS)
    width = max(1.4 * columns, 5.5)
    figure, axes = figures.new_figure(width, 1.75 * rows + 0.5, rows, columns, squeeze=False)
    title = (
        f"{len(flipped)} of {len(dataset):,} answers change: {losses} lost, {gains} gained, "
        f"{others} wrong either way"
    ) + (f" (the first {len(shown)})" if len(shown) < len(flipped) else "")
    title = textwrap.fill(title, int(TITLE_CHARACTERS * width))
    figure.suptitle(title, fontsize=11, fontweight="bold")
    colors, classes = (figures.RED, figures.GREEN, "#555555"), dataset.classes
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, shown, strict=False):
        axis.imshow(dataset.images[index].permute(1, 2, 0).numpy(), interpolation="bicubic")
        axis.set_title(
            f"true: {classes[labels[index]]}\nFP32: {classes[fp32[index]]}\n"
            f"INT8: {classes[int8[index]]}",
            fontsize=7.5, fontweight="normal", color=colors[kinds[index]],
        )  # fmt: skip
    figures.save_figure(figure, path)
    return len(flipped)


def activation_ranges(
    observation: Observation, reduce_range: bool
) -> dict[str, tuple[float, float, float, float]]:
    """Return by operation what was seen and what INT8 keeps: least and greatest value of each."""
    chosen, ranges = observation.ranges(reduce_range), {}
    for step in fuse_activations(observation.network.graph):
        if step.operation.kind not in SAME_RANGE:
            observer, kept = observation.observers[step.name], chosen[step.name]
            name = "input" if step.operation.kind == INPUT else step.operation.name
            ranges[name] = (observer.low, observer.high, *kept.limits)
    return ranges


def weight_ranges(network: Network) -> dict[str, tuple[float, float, float]]:
    """Return each layer's least, median and greatest over channels of their largest magnitudes."""
    ranges = {}
    for name in network.graph.layers:
        largest = network.layers[name].weight.detach().abs().flatten(1).amax(dim=1)
        ranges[name] = (float(largest.min()), float(largest.median()), float(largest.max()))
    return ranges


def plot_ranges(observation: Observation, reduce_range: bool, path: Path) -> None:
    """Plot the ranges of a network's weights, and of its values as they were observed."""
    weights = weight_ranges(observation.network)
    activations = activation_ranges(observation, reduce_range)
    height = max(6.2, 0.17 * len(activations))
    figure, (left, right) = figures.new_figure(11, height, columns=2, width_ratios=(1, 1.25))
    low, median, high = zip(*weights.values(), strict=True)
    rows = range(len(weights))
    left.hlines(rows, low, high, color=figures.BLUE, lw=5, alpha=0.35, label="all channels")
    left.plot(median, rows, "o", color=figures.BLUE, label="median")
    left.set(title="Weights: largest magnitude by channel", xlabel="with batch-norm folded in")
    if any(high):  # a network of zeros has no place on a logarithmic scale
        left.set(xlabel="with batch-norm folded in; log scale", xscale="log")
    rows = range(len(activations))
    seen_low, seen_high, kept_low, kept_high = zip(*activations.values(), strict=True)
    right.hlines(rows, seen_low, seen_high, color=figures.GREY, lw=2, label="seen in calibration")
    right.hlines(
        rows, kept_low, kept_high, color=figures.ORANGE, lw=6, alpha=0.8,
        label="kept by INT8 (clipped beyond)",
    )  # fmt: skip
    right.set(title="Activations: range by operation", xlabel="value of the activation")
    for axis, names in ((left, weights), (right, activations)):
        axis.set_yticks(range(len(names)), names)
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55 / height), ncols=2, fontsize=8)
    figures.save_figure(figure, path)
