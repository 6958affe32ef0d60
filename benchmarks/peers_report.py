"""The rows, the table and the plot of compression_peers.py."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import NNCODEC, ONNX_RUNTIME, OURS, TORCH_PRUNING
from common.report import figures
from common.report import results as report
from common.report.story import Column, Story, Table

PLOT = "compression_peers.png"
WITHIN = 0.01  # loss that the summary allows, as a fraction
LOWEST_POINTS = -6  # networks that lost more are drawn at the edge
COLORS = {
    OURS: figures.BLUE, ONNX_RUNTIME: figures.ORANGE, TORCH_PRUNING: figures.GREEN,
    NNCODEC: figures.RED,
}  # fmt: skip


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    rows, fp32 = results["rows"], results["fp32"]
    timed = next((row["latency"] for row in rows if "latency" in row), [])
    at = f" at batch {timed[-1]['batch_size']}" if timed else ""

    def times_smaller(row: dict) -> float:
        return fp32["size_bytes"] / row["size_bytes"]

    columns = [
        Column("", lambda row: f"{row['method']}, {row['setting']}", name="method"),
        Column("MB", lambda row: row["size_bytes"] / 1e6, "{:.2f}".format),
        Column("smaller", times_smaller, "{:.1f}×".format),
        *report.accuracy_columns(),
        *report.change_columns(),
        *report.rate_columns(timed),
    ]
    note = (
        "At a batch size: INT8 images a second. NNCodec's networks run as the dense one does."
        + report.explain_doubt([row for row in rows if "latency" in row])
    )
    smaller = {method: f"{times_smaller(row):.1f}×" for method, row in best(rows).items()}
    smallest = ", ".join(f"{method} {times}" for method, times in smaller.items())
    fastest = ", ".join(
        f"{method} {report.show_rate(row['latency'][-1])} images/s"
        for method, row in best(rows, speed=True).items()
    )
    return Story(
        f"{report.network_name(results)}: compressed without training",
        report.describe_setting(results)
        + f" Evaluated on the {fp32['accuracy']['total']:,} that pipeline.py did not choose on.",
        [(f"{times} smaller", method) for method, times in smaller.items()],
        [
            Table("", columns, rows, note),
            f"Smallest within one point: {smallest}.",
            f"Fastest within one point{at}: {fastest}.",
        ],
        {PLOT: "Change of accuracy against size, and against INT8 images a second."},
        report.format_cost(results),
    )


def best(rows: Sequence[dict], speed: bool = False) -> dict[str, dict]:
    """Return by method its smallest row within a point, or its fastest at the largest batch."""

    def rank(row: dict) -> float:
        return row["latency"][-1]["images_per_second"] if speed else -row["size_bytes"]

    fits = [row for row in rows if row["comparison"]["drop"] <= WITHIN]
    fits = sorted((row for row in fits if "latency" in row or not speed), key=rank)
    found = {row["method"]: row for row in fits}  # the last one, which ranks highest
    return {row["method"]: found[row["method"]] for row in rows if row["method"] in found}


def plot(results: dict, path: Path) -> None:
    """Plot the change of accuracy against size and, where INT8, against images a second."""
    figure, axes = figures.new_figure(11, 4.6, columns=2, sharey=True)
    fp32_bytes, timed = results["fp32"]["size_bytes"], []
    for method, color in COLORS.items():
        rows = [row for row in results["rows"] if row["method"] == method]
        timed += (own := [row for row in rows if "latency" in row])
        heights = {id(r): max(-100 * r["comparison"]["drop"], LOWEST_POINTS) for r in rows}
        for axis, shown, position in (
            (axes[0], rows, lambda row: fp32_bytes / row["size_bytes"]),
            (axes[1], own, lambda row: row["latency"][-1]["images_per_second"]),
        ):
            points = sorted((position(row), heights[id(row)]) for row in shown)
            line = "o" if method in (OURS, ONNX_RUNTIME) else "o-"
            axis.plot(*zip(*points, strict=True) if points else ([], []), line, color=color,
                      label=method)  # fmt: skip
            for row in shown if method == OURS else ():
                goal = row["setting"].partition(",")[0]
                axis.annotate(
                    goal, (position(row), heights[id(row)]), ha="center",
                    xytext=(0, -15 if goal == "size" else 7),  # it lies close to both
                    textcoords="offset points",
                )  # fmt: skip
    for axis in axes:
        axis.axhline(-100 * WITHIN, color=figures.GREY, lw=1, ls="--", label="one point lost")
    ticks = [2**power for power in range(2, 8)]
    axes[0].set(xscale="log", title="Size", xlabel="times smaller than FP32",
                ylabel=f"points against FP32 (lower ones at {LOWEST_POINTS:g})")  # fmt: skip
    axes[0].set_xlim(3.5, 160)
    axes[0].set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes[0].set_xticks([], minor=True)
    batch_size = timed[0]["latency"][-1]["batch_size"] if timed else ""
    axes[1].set(title="Speed", xlabel=f"INT8 images a second at batch {batch_size}")
    axes[1].legend(loc="best")
    figures.save_figure(figure, path, timed)
