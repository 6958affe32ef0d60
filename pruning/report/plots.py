"""Plots of a run: which layers are sensitive, and how far the linear layers can go."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from common.command.cli import counted
from common.report import figures
from common.report import results as report
from pruning.report import search_plots
from pruning.report.linear import linear_layers

MAX_CURVE_POINTS = 1500
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
        search_plots.plot_model_search(results["model_search"], tolerance, path)


def plot_sensitivity(
    rows: Sequence[dict], dense: float, tolerance: float, amount: float, by_drop: bool, path: Path
) -> None:
    """Draw what pruning each layer alone changes, in network order or sorted ``by_drop``."""
    if by_drop:
        rows = sorted(rows, key=lambda row: -row["comparison"]["drop"])
    value, whiskers = search_plots.accuracies(0.0, rows)
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
    levels, steps = len(values) - 1, linear["steps"]
    found, largest = linear["max_amount"], linear["exhaustive_max_amount"]
    shown = report.floor_percent(found)
    label = f"found {shown}" + ", the largest of all amounts" * (largest == found)
    limit = 100 * (linear["dense"]["value"] - linear["tolerance"])
    figure, (whole, near) = figures.new_figure(10, 4.2, 1, 2, width_ratios=(3, 2))
    points = [(100 * step["amount"], 100 * step["accuracy"]["value"]) for step in steps]
    for axes, stride, lw in ((whole, max(1, levels // MAX_CURVE_POINTS), 1.4), (near, 1, 1.2)):
        axes.axhline(limit, color=figures.ORANGE, ls="--", lw=1.2, label=f"limit {limit:.2f} %")
        axes.axvline(100 * found, color=figures.GREEN, lw=1.2, label=label)
        axes.plot(
            amounts[::stride], values[::stride], color=figures.BLUE, lw=lw, label="every amount"
        )
        for kept, color in ((True, figures.GREEN), (False, figures.RED)):
            chosen = [p for p, step in zip(points, steps, strict=True) if step["kept"] is kept]
            x, y = np.reshape(chosen, (-1, 2)).T
            verdict = "step kept" if kept else "step rejected"
            axes.scatter(x, y, color=color, s=24, zorder=3, label=verdict)
        axes.set_xlabel(f"weights of {linear_layers(linear)} pruned (%)")
    if largest > found:
        label = f"largest of all amounts {report.floor_percent(largest)}"
        near.axvline(100 * largest, color=figures.GREY, ls=":", lw=2, label=label)
    left = max(0.0, 100 * found - 4)
    near.set_xlim(left, min(100.0, 100 * max(largest, found) + 0.5))
    near.set_ylim(limit - 3, values[int(levels * left / 100) :].max() + 0.5)
    near.set_title("Near the answer")
    for axes in (whole, near):
        _number_steps(axes, points, 100 * found)
    tolerated = counted(100 * linear["tolerance"], "point")
    whole.set_title(f"{shown} of {linear_layers(linear)} can go within {tolerated}")
    whole.set_ylabel("top-1 accuracy (%)")
    handles = near.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=8)
    figures.save_figure(figure, path)


def _number_steps(axes: object, points: Sequence[tuple[float, float]], found: float) -> None:
    """Number the search's steps that an axis shows, where numbers would not overlap."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    gap, taken = LABEL_GAP * (right - left), [found]
    for number, (x, y) in enumerate(points, start=1):
        is_shown = left <= x <= right and bottom <= y <= top
        if is_shown and min(abs(x - other) for other in taken) > gap:
            taken.append(x)
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(str(number), (x, y), fontsize=8, **place)
