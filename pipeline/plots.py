"""The plot of pipeline.py: every stage's size, accuracy and latency, a row a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.report import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure
from pipeline.tables import label

FORMS = (
    ("plain_bytes", "as saved", "#C4C4C4"),
    ("compressed_bytes", "through zlib", "#777777"),
    ("packed_bytes", "packed", BLUE),
)
LATENCY_COLORS = (ORANGE, GREEN, GREY, BLUE)


def plot_pipeline(stages: Sequence[dict], path: Path) -> None:
    """Plot file sizes, the change of accuracy with its interval, and the time an image takes.

    Args:
        stages: The ``stages`` of results.json.
        path: PNG to write.
    """
    height = 1.4 + 0.75 * len(stages)
    figure, axes = new_figure(11, height, columns=3, sharey=True, width_ratios=(1.25, 1, 1))
    rows = np.arange(len(stages))
    _plot_sizes(axes[0], stages)
    _plot_accuracy(axes[1], stages)
    _plot_latency(axes[2], stages)
    axes[0].set_yticks(rows, [label(stage) for stage in stages])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    save_figure(figure, path)


def _plot_sizes(axis: object, stages: Sequence[dict]) -> None:
    for index, (key, name, color) in enumerate(FORMS):
        sizes_mb = [stage[key] / 1e6 for stage in stages]
        positions = np.arange(len(stages)) + (index - 1) * 0.27
        bars = axis.barh(positions, sizes_mb, 0.25, color=color, label=name)
        axis.bar_label(bars, [f"{size:.1f}" for size in sizes_mb], padding=3, fontsize=8)
    axis.set(title="Size of the file", xlabel="MB")
    axis.margins(x=0.12)
    axis.legend(loc="lower right", fontsize=8)


def _plot_accuracy(axis: object, stages: Sequence[dict]) -> None:
    drops = np.array([stage["comparison"]["drop"] for stage in stages])
    limits = np.array([stage["comparison"]["ci95"] for stage in stages])
    for row, (drop, (low, high)) in enumerate(zip(drops, limits, strict=True)):
        if row == 0:
            continue  # what the others are compared with
        axis.errorbar(
            -100 * drop, row, xerr=[[100 * (high - drop)], [100 * (drop - low)]], fmt="o",
            color=BLUE, capsize=4, lw=1.8, ms=6,
        )  # fmt: skip
        axis.annotate(
            f"{-100 * drop:+.2f}", (-100 * drop, row), xytext=(0, 8), textcoords="offset points",
            ha="center", fontsize=8.5,
        )  # fmt: skip
    dense = stages[0]["accuracy"]
    axis.axvline(0, color="black", lw=1)
    accuracy = f"{100 * dense['value']:.2f} % of {dense['total']:,} images"
    axis.annotate(
        accuracy, (0, 0), xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
        fontsize=8.5,
    )  # fmt: skip
    axis.set_xlim(left=min(-2.4, -100 * limits.max() - 0.2))
    axis.set(title="Accuracy against dense FP32", xlabel="points, paired, 95 % interval")


def _plot_latency(axis: object, stages: Sequence[dict]) -> None:
    batch_sizes = [entry["batch_size"] for entry in stages[0]["latency"]]
    width = 0.8 / len(batch_sizes)
    for index, size in enumerate(batch_sizes):
        times_ms = [stage["latency"][index]["median_ms"] / size for stage in stages]
        positions = np.arange(len(stages)) + (index - (len(batch_sizes) - 1) / 2) * width
        color = LATENCY_COLORS[index % len(LATENCY_COLORS)]
        bars = axis.barh(positions, times_ms, width * 0.92, color=color, label=f"batch {size}")
        axis.bar_label(bars, [f"{time:.1f}" for time in times_ms], padding=3, fontsize=8)
    axis.set(title="Time on the CPU", xlabel="ms an image")
    axis.margins(x=0.12)
    axis.legend(loc="lower right", fontsize=8)
