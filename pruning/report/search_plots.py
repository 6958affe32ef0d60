"""The plot of the search over many layers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.command.cli import counted
from common.report import figures
from common.report import results as report
from pruning.report.together import fewer, method_name, sparsities


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
        color = figures.RED if entry["finetune_epochs"] else figures.GREEN
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
    limit = f"dense − {counted(100 * tolerance, 'point')}"
    axes.axhline(100 * (dense - tolerance), color="black", ls=":", lw=1.2, label=limit)
    axes.set_xscale("log", base=2)
    marks = sparsities(entries)
    ticks = [1, *(1 / (1 - sparsity) for sparsity in marks)]
    axes.set_xticks(ticks, ["dense", *map(fewer, marks)])
    axes.minorticks_off()
    axes.set(title=search_title(entries, tolerance), ylabel="top-1 accuracy (%), held-out images",
             xlabel="compression: weights before / weights after")  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    figures.save_figure(figure, path)


def search_title(entries: Sequence[dict], tolerance: float) -> str:
    """Name the largest sparsity that is within the tolerance on the held-out images too."""
    held = (entry["max_sparsity"] for entry in entries if entry["within_tolerance"])
    most = report.floor_percent(max(held, default=0.0), 1)
    return f"{most} of the weights can go within {counted(100 * tolerance, 'point')}"
