"""The table and the plot of int8_runtimes.py."""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from benchmarks.runtimes import OURS
from common.report import figures
from common.report import results as report
from common.report.story import Column, Story, Table

PLOT = "int8_runtimes.png"
LABELS = {
    "torch-fp32": "torch FP32 at its best", "onnxruntime-fp32": "ONNX Runtime FP32",
    "onnxruntime-int8": "ONNX Runtime's quantizer", "openvino-int8": "NNCF + OpenVINO",
}  # fmt: skip


def label(name: str) -> str:
    """Return a runtime's name as tables and plots show it."""
    return LABELS.get(name) or f"ours: {name.removeprefix(OURS)}"


def by_runtime(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Group rows by runtime, in order."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["runtime"], []).append(row)
    return groups


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    runtimes = by_runtime(results["rows"])
    ours = [rows for name, rows in runtimes.items() if name.startswith(OURS)]
    rates = itemgetter("images_per_second")
    best = [max(at_one_size, key=rates) for at_one_size in zip(*ours, strict=True)]
    fastest = [f"{row['runtime'].removeprefix(OURS)} at {row['batch_size']}" for row in best]
    columns = [
        Column("images/s at batch", lambda rows: label(rows[0]["runtime"])),
        Column("size", lambda rows: rows[0]["size_bytes"] / 1e6, "{:.1f}".format),
        Column("top-1", lambda rows: 100 * rows[0]["accuracy"], "{:.2f}".format),
        *(Column(str(row["batch_size"]), str(i), report.show_rate) for i, row in enumerate(best)),
    ]
    doubts = report.explain_doubt([{"latency": results["rows"]}])
    return Story(
        f"{report.network_name(results)}: INT8 runtimes",
        report.describe_setting(results),
        [
            (
                f"{report.show_rate(row)} images/s",
                f"at batch {row['batch_size']}: {label(row['runtime'])}",
            )
            for row in best
        ],
        [
            Table("", columns, [*runtimes.values()], "Size in MB, top-1 in %." + doubts),
            f"Fastest engine at batch: {', '.join(fastest)}.",
        ],
        {PLOT: "Images a second at each batch size."},
        report.format_cost(results),
    )


def plot(results: dict, path: Path) -> None:
    """Plot images a second by batch size: FP32 in grey, our engines in blues, others in colour."""
    runtimes = by_runtime(results["rows"])
    shades = {"torch-fp32": "#D0D0D0", "onnxruntime-fp32": "#A8A8A8",
              "onnxruntime-int8": figures.ORANGE, "openvino-int8": figures.GREEN}  # fmt: skip
    blues = iter(("#C6DBEF", "#9ECAE1", "#5AA9DC", "#3182BD", "#08519C"))
    figure, axis = figures.new_figure(11, 4.6)
    drawn = [(label(n), shades.get(n) or next(blues), rows) for n, rows in runtimes.items()]
    figures.draw_rates(axis, drawn, padding=2, fontsize=6.8)
    threads = report.counted(results["environment"]["threads"], "thread")
    axis.set_title(f"INT8 on {results['environment']['cpu']}, {threads}")
    axis.margins(x=0.01, y=0.3)
    axis.legend(loc="upper left", ncols=4, fontsize=8.5)
    figures.save_figure(figure, path, [{"latency": results["rows"]}])
