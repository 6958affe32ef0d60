"""What a run tells: results.json, tables for the console, and the look of the plots."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.command.cli import visible
from common.machine.device import cpu_name, has_vnni

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
    script: str,
    arguments: argparse.Namespace,
    workers: Workers,
    data: dict,
    weights: dict,
    network: dict | None = None,
) -> dict:
    """Return the part of results.json that all scripts share, but for what is known at the end.

    Args:
        script: Its name, such as ``quantization``.
        arguments: As parsed.
        workers: The processes that shared the run, and where FP32 ran.
        data: The source's name, how many images were used for what, and what they are.
        weights: Result of :meth:`common.network.checkpoint.WeightsFile.describe`.
        network: Result of :meth:`common.inputs.Inputs.describe_network`, if there is one.
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
        **({} if network is None else {"network": network}),
    }


def format_cost(results: dict) -> str:
    """Say how long the run took, and what memory."""
    text = f"took {results['wall_seconds']:.0f} s"
    if results["peak_memory_bytes"] is not None:
        text += f" and at most {megabytes(results['peak_memory_bytes'], 0)} of memory"
    return text


def format_given(weights: dict) -> str:
    """Say how large the file is that the user handed in.

    Args:
        weights: results.json's ``weights``.
    """
    kind = ", a coded network" if weights["coded"] else ""
    return f"given file: {megabytes(weights['size_bytes'])}{kind}"


def format_ending(results: dict, output_dir: Path) -> str:
    """Say what the run took, and where its files are."""
    return f"{format_cost(results)}\nwritten to {visible(output_dir)}\n"


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows of equal keys as CSV, with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def to_json(results: dict) -> str:
    """Format results as the text of results.json: ASCII, so that any file name can be in it.

    NaN and infinity are refused with a ValueError, for JSON has neither.
    """
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


# --- console -------------------------------------------------------------------------------------


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in columns: the first to the left, the others to the right."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def percent(value: float, digits: int = 2) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.{digits}f} %"


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
