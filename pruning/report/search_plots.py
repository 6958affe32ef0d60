"""Plots of the search over many layers, and of what removing channels gained."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.command.cli import counted
from common.report import figures
from common.report import results as report
from pruning.channels.search import RECONSTRUCTED
from pruning.report.together import fewer, method_name, sparsities, unit_of
from pruning.together.allocation import SENSITIVITY

COLORS = {SENSITIVITY: figures.GREEN, RECONSTRUCTED: figures.BLUE}


def accuracies(dense: float, entries: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies in percent, and the lengths of their whiskers (2, entries)."""
    comparisons = [entry["comparison"] for entry in entries]
    losses = np.array([[c["drop"], *reversed(c["ci95"])] for c in comparisons])
    value, low, high = 100 * (dense - losses.T)
    return value, np.clip([value - low, high - value], 0, None)


def plot_model_search(entries: Sequence[dict], tolerance: float, path: Path) -> None:
    """Draw accuracy against compression: a line a method, a star where its search ended."""
    figure, axes = figures.new_figure(9.5, 4.8)
    dense = entries[0]["curve"][0][1]
    for entry in entries:
        color = figures.RED if entry["finetune_epochs"] else COLORS[entry["allocation"]]
        style = "--" if entry["recalibrated"] else "-"
        times = [1 / (1 - point["sparsity"]) for point in entry["points"]]
        value, whiskers = accuracies(dense, entry["points"])
        line = ([1.0, *times], [100 * dense, *value])
        axes.plot(*line, style, color=color, lw=1.6, label=method_name(entry))
        axes.errorbar(times, value, whiskers, fmt=".", ms=4, color=color, capsize=2, lw=1)
        if entry["max_sparsity"] > 0:
            found = 1 / (1 - entry["max_sparsity"])
            y = 100 * (dense - entry["comparison"]["drop"])
            face = "white" if entry["recalibrated"] else color
            axes.plot(found, y, "*", ms=12, color=color, mfc=face, zorder=4)
    axes.plot([], [], "*", ms=12, color="black", label="where a search ended")
    if any(entry["recalibrated"] for entry in entries):
        told = "the same, batch norms re-estimated (+ BN)"
        axes.plot([], [], "*", ms=12, color="black", mfc="white", label=told)
    axes.axhline(100 * dense, color="black", lw=1, label="dense")
    tolerated, unit = counted(100 * tolerance, "point"), unit_of(entries)
    limit = f"dense − {tolerated}"
    axes.axhline(100 * (dense - tolerance), color="black", ls=":", lw=1.2, label=limit)
    axes.set_xscale("log", base=2)
    marks = sparsities(entries)
    ticks = [1, *(1 / (1 - sparsity) for sparsity in marks)]
    axes.set_xticks(ticks, ["dense", *map(fewer, marks)])
    axes.minorticks_off()
    axes.set(title=search_title(entries, tolerance), ylabel="top-1 accuracy (%), held-out images",
             xlabel=f"compression: {unit} before / {unit} after")  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    figures.save_figure(figure, path)


def search_title(entries: Sequence[dict], tolerance: float) -> str:
    """Name the largest sparsity that is within the tolerance on the held-out images too."""
    held = (entry["max_sparsity"] for entry in entries if entry["within_tolerance"])
    most = report.floor_percent(max(held, default=0.0), 1)
    return f"{most} of the {unit_of(entries)} can go within {counted(100 * tolerance, 'point')}"


def plot_slim(models: list[dict], path: Path) -> None:
    """Draw accuracy against images a second, an arrow from dense to slim, at two batch sizes."""
    figure, axes = figures.new_figure(8, 4.5)
    named = {model["name"]: model for model in models}
    for precision, color in (("fp32", figures.BLUE), ("int8", figures.GREEN)):
        for index, marker in ((0, "o"), (-1, "s")):
            ends = []
            for name, face in (("dense", "white"), ("slim", color)):
                model = named[f"{name} {precision}"]
                timing, accuracy = model["latency"][index], model["accuracy"]
                rate, value = timing["images_per_second"], 100 * accuracy["value"]
                low, high = (100 * limit for limit in accuracy["ci95"])
                axes.errorbar(
                    rate, value, [[value - low], [high - value]], fmt=marker, color=color,
                    mfc=face, ms=8, capsize=2, lw=1, alpha=0.9,
                    label=f"{name} {precision.upper()}, batch {timing['batch_size']}",
                )  # fmt: skip
                ends.append((rate, value))
                if mark := report.doubt(timing):
                    axes.annotate(mark, ends[-1], xytext=(7, 4), textcoords="offset points")
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
    axes.set(xscale="log", xlabel="images a second (median)",
             ylabel="top-1 accuracy (%), held-out images",
             title="Dense and slim, FP32 and INT8")  # fmt: skip
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    figures.save_figure(figure, path, models)
