"""What a run tells: results.json, tables for the console, and the look of the plots."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.machine.device import cpu_name, has_vnni
from common.report.story import Column

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from common.machine.workers import Workers

SCHEMA = 1
# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY = "#CC79A7", "#999999"


# --- results.json --------------------------------------------------------------------------------


def common_results(
    script: str, arguments: argparse.Namespace, workers: Workers, data: dict, weights: dict
) -> dict:
    """Return the part of results.json that all scripts share, but for what is known at the end.

    Args:
        script: Its name, such as ``quantization``.
        arguments: As parsed.
        workers: The processes that shared the run, and where FP32 ran.
        data: The source's name, and how many images were used for what.
        weights: From :meth:`common.network.checkpoint.WeightsFile.describe`.
    """
    device = workers.device.type
    return {
        "schema": SCHEMA,
        "script": script,
        "arguments": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(vars(arguments).items())
        },
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "vnni": has_vnni(),
            "device": device,
            "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        },
        "processes": workers.count,
        "data": data,
        "weights": weights,
    }


def format_cost(results: dict) -> str:
    """Say how long the run took, and what memory."""
    text = f"took {results['wall_seconds']:.0f} s"
    if results["peak_memory_bytes"] is not None:
        text += f" and at most {megabytes(results['peak_memory_bytes'], 0)} of memory"
    return text


def to_json(results: dict) -> str:
    """Format results as the text of results.json: ASCII, so that any file name can be in it.

    NaN and infinity are refused with a ValueError, for JSON has neither.
    """
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


# --- text ----------------------------------------------------------------------------------------


def describe_setting(results: dict) -> str:
    """Say on which images and which machine the numbers were measured."""
    data, environment = results["data"], results["environment"]
    threads = environment["threads"]
    setting = (
        f"{data['test_images']:,} test images ({data['source']}), {threads} "
        f"thread{'s' * (threads != 1)}, {environment['cpu']}"
    )
    if environment["device"] != "cpu":
        setting += f", FP32 on {environment['device_name']}"
    return setting


def percent(value: float, digits: int = 2) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.{digits}f} %"


def floor_percent(value: float, digits: int = 2) -> str:
    """Format a largest fraction as a percentage, rounded down: more would be too much."""
    return f"{math.floor(100 * value * 10**digits + 1e-9) / 10**digits:.{digits}f} %"


def p_value(value: float, digits: int = 2) -> str:
    """Format a p-value by its leading digits; the least may be too small for a float."""
    return f"{value:.{digits}g}" if value else "<1e-300"


def points(value: float, digits: int = 2) -> str:
    """Format a difference of fractions in percentage points, with its sign."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"  # 0.0: no minus before a zero


class Change(NamedTuple):
    """A change of accuracy in points as text, a loss negative, and its 95 % interval."""

    points: str
    low: str
    high: str


def format_change(comparison: Mapping[str, Any], digits: int = 2) -> Change:
    """Format a ``comparison`` object of results.json, which counts a loss as positive."""
    low, high = comparison["ci95"]
    return Change(*(points(-loss, digits) for loss in (comparison["drop"], high, low)))


def megabytes(size_bytes: float, digits: int = 2) -> str:
    """Format bytes as megabytes (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.{digits}f} MB"


# --- columns that several tables have -------------------------------------------------------------


def accuracy_columns(with_counts: bool = False) -> list[Column]:
    """Return the column of top-1 accuracies, and those of the counts behind it."""
    counts = [
        Column("correct", lambda row: row["accuracy"]["correct"]),
        Column("total", lambda row: row["accuracy"]["total"]),
    ]
    shown = Column("accuracy", lambda row: row["accuracy"]["value"], percent)
    return [*(counts if with_counts else []), shown]


def change_columns(digits: int = 2) -> list[Column]:
    """Return the columns of the change against dense, in points, and of its 95 % interval.

    Nothing is shown for the network that the others are compared with.
    """

    def part(name: str) -> Callable[[dict], str | None]:
        def value(row: dict) -> str | None:
            comparison = row.get("comparison")
            if not comparison or "mcnemar_p" not in comparison:
                return None
            change = format_change(comparison, digits)
            return change.points if name == "points" else f"{change.low} … {change.high}"

        return value

    return [Column("points", part("points")), Column("95 % interval", part("interval"))]


def rate_columns(latency: Sequence[dict]) -> list[Column]:
    """Return a column of images a second for each batch size of ``latency``."""

    def at(index: int) -> Callable[[dict], float]:
        return lambda row: row["latency"][index]["images_per_second"]

    return [
        Column(f"batch {timing['batch_size']}", at(index), "{:,.0f}".format)
        for index, timing in enumerate(latency)
    ]


# --- plots ---------------------------------------------------------------------------------------


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: object):
    """Return ``(figure, axes)`` in the house style; sizes in inches.

    The figure belongs to no window system, so that no display is needed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update(
        {
            "font.size": 9.5,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "legend.frameon": False,
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; the same data gives the same bytes."""
    figure.savefig(path, metadata={"Software": None})
