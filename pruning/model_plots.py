"""The search over the whole network in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.report import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure
from pruning.allocation import RANDOM
from pruning.model_search import COMPRESSIONS
from pruning.model_tables import method_name

MODEL_PLOT = "model_search.png"
COLORS = {"uniform": ORANGE, "global": BLUE, "sensitivity": GREEN, RANDOM: GREY}


def plot_model_search(entries: Sequence[dict], tolerance: float, path: Path) -> None:
    """Draw accuracy against compression: a line a method, a star where its search ended.

    Args:
        entries: results.json's ``model_search``.
        tolerance: Drop that is drawn as a limit.
        path: Of the PNG.
    """
    figure, axes = new_figure(9.5, 4.8)
    dense = entries[0]["curve"][0][1]
    for entry in entries:
        color = RED if entry["finetune_epochs"] else COLORS[entry["allocation"]]
        style = "--" if entry["recalibrated"] else "-"
        times = [1.0, *(1 / (1 - point["sparsity"]) for point in entry["points"])]
        value = [100 * dense, *(100 * (dense - p["comparison"]["drop"]) for p in entry["points"])]
        axes.plot(times, value, style, color=color, lw=1.6, label=method_name(entry))
        for x, y, point in zip(times[1:], value[1:], entry["points"], strict=True):
            low, high = (100 * (dense - limit) for limit in point["comparison"]["ci95"][::-1])
            whiskers = [[max(0.0, y - low)], [max(0.0, high - y)]]
            axes.errorbar(x, y, whiskers, fmt=".", ms=4, color=color, capsize=2, lw=1)
        if entry["max_sparsity"] > 0 and entry["allocation"] != RANDOM:
            found = 1 / (1 - entry["max_sparsity"])
            y = 100 * (dense - entry["comparison"]["drop"])
            face = "white" if entry["recalibrated"] else color
            axes.plot(found, y, "*", ms=12, color=color, mfc=face, zorder=4)
    axes.axhline(100 * dense, color="black", lw=1)
    axes.axhline(100 * (dense - tolerance), color="black", ls=":", lw=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, *COMPRESSIONS], ["dense", *(f"{times}×" for times in COMPRESSIONS)])
    axes.minorticks_off()
    axes.set_xlabel("compression: weights before / weights after")
    axes.set_ylabel("top-1 accuracy (%), held-out images")
    best = max(entry["max_sparsity"] for entry in entries if entry["allocation"] != RANDOM)
    axes.set_title(
        f"{100 * best:.1f} % of the weights can go within {100 * tolerance:g} points "
        "(star: where each search ended)"
    )
    axes.legend(loc="lower left")
    save_figure(figure, path)
