"""The look of plots: colours, figures in the house style, and what several scripts draw alike."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.report.results import doubt, explain_doubt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY = "#CC79A7", "#999999"
SMALL_CHARACTERS = 15  # of 8 points, that fit into an inch
STYLE = {
    "font.size": 9.5, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4", "legend.frameon": False,
}  # fmt: skip


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: object):
    """Return ``(figure, axes)`` in the house style, for no display; sizes in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    return figure, figure.subplots(rows, columns, **options)


def draw_rates(
    axis: Axes, models: Sequence[tuple[str, str, Sequence[dict]]], **text: object
) -> None:
    """Draw images a second by batch size: a bar for each label, colour and ``latency``."""
    width = 0.82 / len(models)
    for index, (label, color, latency) in enumerate(models):
        first = (index - (len(models) - 1) / 2) * width
        positions = [first + place for place in range(len(latency))]
        rates = [timing["images_per_second"] for timing in latency]
        bars = axis.bar(positions, rates, 0.95 * width, color=color, label=label)
        shown = [f"{timing['images_per_second']:.0f}{doubt(timing)}" for timing in latency]
        axis.bar_label(bars, shown, **text)
    axis.set_xticks(range(len(latency)), [f"batch {timing['batch_size']}" for timing in latency])
    axis.set_ylabel("images a second")


def save_figure(figure: Figure, path: Path, timed: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the figure as PNG; the same data gives the same bytes.

    Question marks at the ``latency`` of what was timed are explained below, if there are any.
    """
    if explanation := explain_doubt(timed).strip():
        fits = int(SMALL_CHARACTERS * figure.get_figwidth())
        figure.supxlabel(textwrap.fill(explanation, fits), fontsize=8, color=RED)
    figure.savefig(path, metadata={"Software": None})
