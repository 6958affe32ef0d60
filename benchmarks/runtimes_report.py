"""The rows, the table and the plot of int8_runtimes.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.runtimes import OURS, Runtime
from common.measure.latency import Timing
from common.report import figures
from common.report import results as report
from common.report.story import Column, Story, Table
from quantization.int8.engines import fastest_by_batch_size

PLOT = "int8_runtimes.png"
BEST = f"{OURS}best"
LABELS = {
    "torch-fp32": "torch FP32 at its best", "onnxruntime-fp32": "ONNX Runtime FP32",
    "onnxruntime-int8": "ONNX Runtime's quantizer", "openvino-int8": "NNCF + OpenVINO",
    BEST: "ours: the fastest engine",
}  # fmt: skip


def describe(
    runtimes: Mapping[str, Runtime], accuracies: Mapping[str, float],
    timings: Mapping[str, Sequence[Timing]],
) -> list[dict]:  # fmt: skip
    """Return the rows of results.json; for each batch size our fastest engine appears again."""
    ours = {name: timed for name, timed in timings.items() if name.startswith(OURS)}
    fastest = fastest_by_batch_size(ours)
    rows = []
    for name in (*runtimes, BEST):
        for index, size in enumerate(fastest):
            source = fastest[size] if name == BEST else name
            timing = timings[source][index]
            rows.append({
                "runtime": name,
                **({"same_as": source} if name == BEST else {}),
                **timing.as_dict(),
                "accuracy": accuracies[source],
                "size_bytes": runtimes[source].size_bytes,
            })  # fmt: skip
    return rows


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
    best = [(row["batch_size"], label(row["same_as"]), row) for row in runtimes[BEST]]
    fastest = ", ".join(f"{name.removeprefix('ours: ')} at {size}" for size, name, _ in best)
    doubts = report.explain_doubt([{"latency": results["rows"]}])
    return Story(
        f"{report.network_name(results)}: INT8 runtimes",
        report.describe_setting(results),
        [
            (f"{report.show_rate(row)} images/s", f"at batch {size}: {name}")
            for size, name, row in best
        ],
        [
            Table("", _columns(runtimes), [*runtimes.values()], "Size in MB, top-1 in %." + doubts),
            f"Fastest engine at batch: {fastest}.",
        ],
        {PLOT: "Images a second at each batch size."},
        report.format_cost(results),
    )


def _columns(runtimes: Mapping[str, Sequence[dict]]) -> list[Column]:
    speeds = [
        Column(str(row["batch_size"]), str(index), report.show_rate)
        for index, row in enumerate(runtimes[BEST])
    ]
    return [
        Column("images/s at batch", lambda rows: label(rows[0]["runtime"])),
        Column("size", lambda rows: rows[0]["size_bytes"] / 1e6, "{:.1f}".format),
        Column("top-1", lambda rows: 100 * rows[0]["accuracy"], "{:.2f}".format),
        *speeds,
    ]


def plot(results: dict, path: Path) -> None:
    """Plot images a second by batch size: FP32 in grey, our engines in blues, others in colour."""
    everything = by_runtime(results["rows"])
    shown = [name for name in everything if name != BEST]
    shades = {"torch-fp32": "#D0D0D0", "onnxruntime-fp32": "#A8A8A8",
              "onnxruntime-int8": figures.ORANGE, "openvino-int8": figures.GREEN}  # fmt: skip
    blues = iter(("#C6DBEF", "#9ECAE1", "#5AA9DC", "#3182BD", "#08519C"))
    figure, axis = figures.new_figure(11, 4.6)
    drawn = [(label(n), shades.get(n) or next(blues), everything[n]) for n in shown]
    figures.draw_rates(axis, drawn, padding=2, fontsize=6.8)
    threads = report.counted(results["environment"]["threads"], "thread")
    axis.set_title(f"INT8 on {results['environment']['cpu']}, {threads}")
    axis.margins(x=0.01, y=0.3)
    axis.legend(loc="upper left", ncols=4, fontsize=8.5)
    figures.save_figure(figure, path, [{"latency": results["rows"]}])
