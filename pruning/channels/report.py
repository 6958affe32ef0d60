"""What removing channels gained: a table of speeds, and accuracy against images a second."""

from __future__ import annotations

from pathlib import Path

from common.report.results import (
    BLUE,
    GREEN,
    format_table,
    megabytes,
    new_figure,
    percent,
    points,
    save_figure,
)

PLOT = "slim.png"


def speed_table(models: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: accuracy and images a second of dense and slim, FP32 and INT8."""
    sizes = [timing["batch_size"] for timing in models[0]["latency"]]
    header = ["images/s at", "size", "points", "MACs", *(f"batch {size}" for size in sizes)]
    rows = [
        [
            f"{model['name'].replace('fp32', 'FP32').replace('int8', 'INT8')}",
            megabytes(model["size_bytes"]),
            points(0.0 - model["comparison"]["drop"]),
            percent(model["macs"] / models[0]["macs"], 0),
            *(f"{timing['images_per_second']:,.0f}" for timing in model["latency"]),
        ]
        for model in models
    ]
    return header, rows


def format_slim(slim: dict) -> str:
    """Lay out results.json's ``slim`` for a terminal 80 columns wide."""
    models, widths = slim["models"], slim["widths"]
    ratios = ", ".join(
        f"{entry['over_dense']:.2f}× at batch {entry['batch_size']}" for entry in slim["speedup"]
    )
    return "\n".join(
        [
            f"Slim and dense in turns, {models[0]['accuracy']['total']:,} held-out images",
            format_table(*speed_table(models)),
            f"  INT8, slim against dense: {ratios}",
            f"  inner channels of the blocks: {', '.join(map(str, widths['inner']))}",
        ]
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
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
    axes.set_xscale("log")
    axes.set_xlabel("images a second (median)")
    axes.set_ylabel("top-1 accuracy (%), held-out images")
    axes.set_title("Dense and slim, FP32 and INT8")
    axes.legend(fontsize=7, loc="lower left")
    save_figure(figure, path)
