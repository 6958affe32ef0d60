"""The plot of pipeline.py: the frontier, accuracy against size and against images a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.report.results import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    doubt,
    mark_doubt,
    new_figure,
    save_figure,
)
from pipeline.story import label, size_of

COLORS = {"int8": GREY, "size": BLUE, "speed": ORANGE, "both": GREEN}


def plot_frontier(results: dict, path: Path) -> None:
    """Plot every answer with its interval, and small what was tried on the way.

    Args:
        results: results.json.
        path: PNG to write.
    """
    figure, axes = new_figure(11, 4.6, columns=2, sharey=True)
    batch_size = results["models"][0]["latency"][-1]["batch_size"]
    fp32_bytes = results["models"][0]["size_bytes"]
    _plot(axes[0], results, lambda entry: fp32_bytes / size_of(entry))
    _plot(axes[1], results, lambda entry: entry["latency"][-1]["images_per_second"])
    _plot_doubt(axes[1], results, lambda entry: entry["latency"][-1]["images_per_second"])
    shown = [*results["models"], *results["answers"]]
    mark_doubt(figure, [{"latency": entry["latency"][-1:]} for entry in shown])
    axes[0].set(xscale="log", title="How small", xlabel="times smaller than the FP32 file")
    ticks = (1, 2, 4, 8, 16, 32, 64, 128)
    axes[0].set_xlim(0.75, 1.4 * max(*ticks, *(fp32_bytes / size_of(entry) for entry in shown)))
    axes[0].set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes[0].set_xticks([], minor=True)
    axes[1].set(title="How fast", xlabel=f"images a second at batch {batch_size}")
    axes[1].set_xlim(left=0)
    axes[0].set_ylabel("points against FP32")
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    save_figure(figure, path)


def _plot(axis: object, results: dict, position: Callable[[dict], float]) -> None:
    max_drop, fp32 = results["budget"]["max_drop"], results["models"][0]
    coded = results["weights"]["coded"]
    axis.axhline(-100 * max_drop, color=RED, lw=1, ls="--", label="the budget")
    axis.plot(position(fp32), 0, "D", color="black", ms=7, label=label("fp32", coded))
    _plot_tried(axis, results["tried"], position, max_drop)
    for entry in [results["models"][1], *results["answers"]]:
        comparison = entry["comparison"]
        change, (low, high) = -100 * comparison["drop"], comparison["ci95"]
        axis.errorbar(
            position(entry), change,
            yerr=[[100 * high + change], [-100 * low - change]], fmt="o", ms=8, capsize=4, lw=1.6,
            color=COLORS[entry["name"]], label=label(entry["name"], coded),
        )  # fmt: skip


def _plot_doubt(axis: object, results: dict, position: Callable[[dict], float]) -> None:
    """Put a question mark beside what was timed while the machine was busy."""
    for entry in [*results["models"], *results["answers"]]:
        axis.annotate(
            doubt(entry["latency"][-1]), (position(entry), -100 * entry["comparison"]["drop"]),
            xytext=(9, 7), textcoords="offset points", color=RED, fontweight="bold",
        )  # fmt: skip


def _plot_tried(
    axis: object, tried: Sequence[dict], position: Callable[[dict], float], max_drop: float
) -> None:
    """Draw what was tried, as the images that choose saw it; what fell off the plot at its edge."""
    lowest = -100 * max(4 * max_drop, 0.02)
    for trained, marker in ((False, "."), (True, "x")):
        entries = [entry for entry in tried if entry["trained"] is trained]
        if entries:
            axis.plot([], [], marker, color=GREY, ms=7, label="tried" + ", trained" * trained)
        for entry in entries:
            height = max(-100 * entry["comparison"]["drop"], lowest)
            axis.plot(position(entry), height, marker, color=COLORS[entry["goal"]], alpha=0.6, ms=7)
