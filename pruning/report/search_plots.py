"""Plots of the search over many layers, and of what removing channels gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.report.results import (
    BLUE,
    GREEN,
    GREY,
    RED,
    counted,
    doubt,
    floor_percent,
    mark_doubt,
    new_figure,
    save_figure,
)
from pruning.channels.search import RECONSTRUCTED
from pruning.report.together import fewer, method_name, sparsities, unit_of
from pruning.together.allocation import RANDOM, SENSITIVITY
from pruning.together.search import CONTROLS

SEARCH_PLOT, SLIM_PLOT = "model_search.png", "slim.png"
COLORS = {SENSITIVITY: GREEN, RANDOM: GREY, RECONSTRUCTED: BLUE}


def accuracies(dense: float, entries: Sequence[dict]) -> np.ndarray:
    """Return accuracies in percent as losses from ``dense``: values, lower and upper limits."""
    comparisons = [entry["comparison"] for entry in entries]
    losses = np.array([[c["drop"], *reversed(c["ci95"])] for c in comparisons])
    return 100 * (dense - losses.T)


def plot_model_search(entries: Sequence[dict], tolerance: float, path: Path) -> None:
    """Draw accuracy against compression: a line a method, a star where its search ended.

    Args:
        entries: The ``model_search`` rows of results.json.
        tolerance: Drop that is drawn as a limit.
        path: Path of the PNG.
    """
    figure, axes = new_figure(9.5, 4.8)
    dense = entries[0]["curve"][0][1]
    for entry in entries:
        color = RED if entry["finetune_epochs"] else COLORS[entry["allocation"]]
        style = "--" if entry["recalibrated"] else "-"
        times = [1 / (1 - point["sparsity"]) for point in entry["points"]]
        value, low, high = accuracies(dense, entry["points"])
        line = ([1.0, *times], [100 * dense, *value])
        axes.plot(*line, style, color=color, lw=1.6, label=method_name(entry))
        whiskers = np.clip([value - low, high - value], 0, None)
        axes.errorbar(times, value, whiskers, fmt=".", ms=4, color=color, capsize=2, lw=1)
        if entry["max_sparsity"] > 0 and entry["allocation"] not in CONTROLS:
            found = 1 / (1 - entry["max_sparsity"])
            y = 100 * (dense - entry["comparison"]["drop"])
            face = "white" if entry["recalibrated"] else color
            axes.plot(found, y, "*", ms=12, color=color, mfc=face, zorder=4)
    axes.axhline(100 * dense, color="black", lw=1, label="dense")
    limit = f"dense − {counted(100 * tolerance, 'point')}"
    axes.axhline(100 * (dense - tolerance), color="black", ls=":", lw=1.2, label=limit)
    axes.set_xscale("log", base=2)
    marks = sparsities(entries)
    ticks = [1, *(1 / (1 - sparsity) for sparsity in marks)]
    axes.set_xticks(ticks, ["dense", *(fewer(sparsity) for sparsity in marks)])
    axes.minorticks_off()
    unit = unit_of(entries)
    axes.set_xlabel(f"compression: {unit} before / {unit} after")
    axes.set_ylabel("top-1 accuracy (%), held-out images")
    axes.set_title(search_title(entries, tolerance))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    save_figure(figure, path)


def search_title(entries: Sequence[dict], tolerance: float) -> str:
    """Name the largest sparsity that is within the tolerance on the held-out images too."""
    held = [
        entry["max_sparsity"]
        for entry in entries
        if entry["allocation"] not in CONTROLS and entry["within_tolerance"]
    ]
    return (
        f"{floor_percent(max(held, default=0.0), 1)} of the {unit_of(entries)} can go within "
        f"{counted(100 * tolerance, 'point')} (star: where each search ended)"
    )


def plot_slim(models: list[dict], path: Path) -> None:
    """Draw accuracy against images a second at the largest batch, an arrow from dense to slim.

    Args:
        models: results.json's ``slim.models``.
        path: Of the PNG.
    """
    figure, axes = new_figure(8, 4.5)
    for precision, color in (("fp32", BLUE), ("int8", GREEN)):
        for index, marker in ((0, "o"), (-1, "s")):
            dense, slim = (
                next(m for m in models if m["name"] == f"{name} {precision}")
                for name in ("dense", "slim")
            )
            batch = dense["latency"][index]["batch_size"]
            ends = []
            for model, face in ((dense, "white"), (slim, color)):
                rate = model["latency"][index]["images_per_second"]
                value = 100 * model["accuracy"]["value"]
                low, high = (100 * limit for limit in model["accuracy"]["ci95"])
                axes.errorbar(
                    rate, value, [[value - low], [high - value]], fmt=marker, color=color,
                    mfc=face, ms=8, capsize=2, lw=1, alpha=0.9,
                    label=f"{model['name'].replace(precision, precision.upper())}, batch {batch}",
                )  # fmt: skip
                ends.append((rate, value))
                if mark := doubt(model["latency"][index]):
                    axes.annotate(mark, (rate, value), xytext=(7, 4), textcoords="offset points")
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
    axes.set_xscale("log")
    axes.set_xlabel("images a second (median)")
    axes.set_ylabel("top-1 accuracy (%), held-out images")
    axes.set_title("Dense and slim, FP32 and INT8")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    mark_doubt(figure, models)
    save_figure(figure, path)
