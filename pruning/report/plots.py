"""Plots of a run: which layers are sensitive, and how far layers can go together."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from common.command.cli import counted
from common.report import figures
from common.report import results as report
from pruning.report.searches import fewer, linear_layers, method_name, sparsities

LABEL_GAP = 0.03  # of the axis, between the numbers of two steps, and the line of the answer


def draw_all(results: dict, file: Callable[[str], Path]) -> None:
    """Draw every plot of results.json; ``file`` returns the path to write a name to."""
    dense, tolerance = results["baseline"]["value"], results["arguments"]["tolerance"]
    amounts = [ranking["amount"] for ranking in results["ranking"]]
    for amount in amounts:
        rows = [row for row in results["sensitivity"] if row["amount"] == amount]
        percentage = (100 * Decimal(repr(amount))).normalize()  # exact: no two share a name
        name = f"sensitivity_{percentage:f}" if len(amounts) > 1 else "sensitivity"
        for by_drop, ending in ((False, ""), (True, "_sorted")):
            path = file(f"{name}{ending}.png")
            plot_sensitivity(rows, dense, tolerance, amount, by_drop, path)
    if len(amounts) > 1:
        plot_amounts(results["sensitivity"], dense, tolerance, file("sensitivity_amounts.png"))
    if "linear_search" in results:
        plot_search(results["linear_search"], file("linear_search.png"))
    if "model_search" in results:
        path = file("model_search.png")
        plot_model_search(results["model_search"], tolerance, path)


def accuracies(dense: float, entries: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies in percent, and the lengths of their whiskers (2, entries)."""
    comparisons = [entry["comparison"] for entry in entries]
    losses = np.array([[c["drop"], *reversed(c["ci95"])] for c in comparisons])
    value, low, high = 100 * (dense - losses.T)
    return value, np.clip([value - low, high - value], 0, None)


def plot_sensitivity(
    rows: Sequence[dict], dense: float, tolerance: float, amount: float, by_drop: bool, path: Path
) -> None:
    """Draw what pruning each layer alone changes, in network order or sorted ``by_drop``."""
    if by_drop:
        rows = sorted(rows, key=lambda row: -row["comparison"]["drop"])
    value, whiskers = accuracies(0.0, rows)
    limit = -100 * tolerance
    figure, axes = figures.new_figure(max(9.5, 0.3 * len(rows)), 4.6)
    positions = np.arange(len(rows))
    tolerated = counted(100 * tolerance, "point")
    lost, kept = value + whiskers[1] < limit, value - whiskers[0] >= limit
    for chosen, color, meaning in (
        (lost, figures.RED, f"loses more than {tolerated}"),
        (kept, figures.BLUE, "loses less"),
        (~(lost | kept), figures.PURPLE, "either: the interval crosses the line"),
    ):
        axes.bar(positions[chosen], value[chosen], color=color, width=0.72, label=meaning)
    axes.errorbar(
        positions, value, whiskers, fmt="none", ecolor="#333333", capsize=2.5, lw=1,
        label="95 % interval",
    )  # fmt: skip
    axes.axhline(0, color="black", lw=1.2, label=f"dense: {report.percent(dense)}")
    axes.axhline(limit, color=figures.ORANGE, lw=1.2, ls="--", label=f"dense − {tolerated}")
    axes.set_xticks(positions, [row["layer"] for row in rows], rotation=60, ha="right")
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("top-1 accuracy against dense (points)")
    axes.set_title(
        f"{lost.sum()} of {len(rows)} layers clearly lose more than {tolerated} when "
        f"{100 * amount:g} % of their weights go" + " (sorted by drop)" * by_drop
    )
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    figures.save_figure(figure, path)


def plot_amounts(rows: Sequence[dict], dense: float, tolerance: float, path: Path) -> None:
    """Draw several amounts: a curve a layer, and a heat map of layers × amounts."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    amounts = sorted({row["amount"] for row in rows})
    found = {(row["layer"], row["amount"]): row["comparison"]["drop"] for row in rows}
    drops = np.array([[found[layer, amount] for amount in amounts] for layer in layers])
    changes = 0.0 - 100 * drops  # no minus before a zero
    figure, (curves, heat) = figures.new_figure(11, 5.6, 1, 2, width_ratios=(1, 1))
    worst = set(np.argsort(changes[:, -1])[:5])
    palette = iter((figures.RED, figures.BLUE, figures.GREEN, figures.ORANGE, figures.PURPLE))
    for index, layer in enumerate(layers):
        accuracy = 100 * dense + np.concatenate([[0.0], changes[index]])
        style = {"color": figures.GREY, "lw": 0.9}
        if index in worst:
            style = {"color": next(palette), "label": layer, "lw": 2, "zorder": 3}
        curves.plot([0, *(100 * a for a in amounts)], accuracy, marker="o", ms=3, **style)
    curves.axhline(100 * (dense - tolerance), color="black", ls="--", lw=1)
    curves.set(
        title="One layer pruned alone", xlabel="amount pruned (%)", ylabel="top-1 accuracy (%)"
    )
    curves.legend(title="most sensitive", loc="lower left")
    image = heat.imshow(changes, aspect="auto", cmap="Reds_r", vmax=0)
    heat.set_xticks(range(len(amounts)), [f"{100 * a:g} %" for a in amounts])
    heat.set_yticks(range(len(layers)), layers, fontsize=8)
    heat.grid(visible=False)
    heat.set_title("Points against dense")
    dark = 0.6 * changes.min()
    for (row, column), change in np.ndenumerate(changes):
        color = "white" if change < dark else "black"
        heat.text(column, row, f"{change:.1f}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(image, ax=heat)
    figures.save_figure(figure, path)


def plot_search(linear: dict, path: Path) -> None:
    """Draw accuracy against the amount of the linear layers, the limit and the search's steps."""
    amounts, values = 100 * np.array(linear["curve"]).T
    found, largest = linear["max_amount"], linear["exhaustive_max_amount"]
    shown = report.floor_percent(found)
    label = f"found {shown}" + ", the largest of all amounts" * (largest == found)
    limit = 100 * (linear["dense"]["value"] - linear["tolerance"])
    figure, (whole, near) = figures.new_figure(10, 4.2, 1, 2, width_ratios=(3, 2))
    kept = np.array([step["kept"] for step in linear["steps"]])
    tried = 100 * np.array([[s["amount"], s["accuracy"]["value"]] for s in linear["steps"]])
    for axes in (whole, near):
        axes.axhline(limit, color=figures.ORANGE, ls="--", lw=1.2, label=f"limit {limit:.2f} %")
        axes.axvline(100 * found, color=figures.GREEN, lw=1.2, label=label)
        axes.plot(amounts, values, color=figures.BLUE, lw=1.2, label="every amount")
        for points, color, verdict in (
            (tried[kept], figures.GREEN, "step kept"), (tried[~kept], figures.RED, "step rejected")
        ):  # fmt: skip
            axes.scatter(*points.T, color=color, s=24, zorder=3, label=verdict)
        axes.set_xlabel(f"weights of {linear_layers(linear)} pruned (%)")
    if largest > found:
        label = f"largest of all amounts {report.floor_percent(largest)}"
        near.axvline(100 * largest, color=figures.GREY, ls=":", lw=2, label=label)
    left = max(0.0, 100 * found - 4)
    near.set_xlim(left, min(100.0, 100 * max(largest, found) + 0.5))
    near.set_ylim(limit - 3, values[amounts >= left].max() + 0.5)
    near.set_title("Near the answer")
    for axes in (whole, near):
        _number_steps(axes, tried, 100 * found)
    tolerated = counted(100 * linear["tolerance"], "point")
    whole.set_title(f"{shown} of {linear_layers(linear)} can go within {tolerated}")
    whole.set_ylabel("top-1 accuracy (%)")
    handles = near.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=8)
    figures.save_figure(figure, path)


def _number_steps(axes: object, points: np.ndarray, found: float) -> None:
    """Number the search's steps that an axis shows, where numbers would not overlap."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    gap, taken = LABEL_GAP * (right - left), [found]
    for number, (x, y) in enumerate(points, start=1):
        is_shown = left <= x <= right and bottom <= y <= top
        if is_shown and min(abs(x - other) for other in taken) > gap:
            taken.append(x)
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(str(number), (x, y), fontsize=8, **place)


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
