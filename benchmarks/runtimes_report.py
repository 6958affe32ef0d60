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
    timings: Mapping[str, Sequence[Timing]], macs: int, gemm_rate: float,
) -> list[dict]:  # fmt: skip
    """Return the rows of results.json; for each batch size our fastest engine appears again.

    ``macs`` are those of an image; ``gemm_rate`` is the multiply-accumulates a second of an INT8
    matrix product.
    """
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
                "macs_per_image": macs,
                "share_of_gemm_rate": timing.images_per_second * macs / gemm_rate,
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
    gemm_rate = results["gemm_macs_per_second"] / 1e9
    doubts = report.explain_doubt([{"latency": results["rows"]}])
    note = (
        "Size in MB, top-1 in %; in brackets % of the rate of a large INT8 matrix product, "
        f"{gemm_rate:.0f} GMAC/s."
    )
    return Story(
        f"{report.network_name(results)}: INT8 runtimes",
        report.describe_setting(results),
        [
            (f"{report.show_rate(row)} images/s", f"at batch {size}: {name}")
            for size, name, row in best
        ],
        [
            Table("", _columns(runtimes), [*runtimes.values()], note + doubts),
            f"Fastest engine at batch: {fastest}.",
        ],
        {PLOT: "Images a second at each batch size."},
        report.format_cost(results),
    )


def _columns(runtimes: Mapping[str, Sequence[dict]]) -> list[Column]:
    def show_speed(row: dict) -> str:
        rate = f"{row['images_per_second']:.0f}{report.doubt(row)}"
        return f"{rate} ({100 * row['share_of_gemm_rate']:.0f})"

    speeds = [
        Column(str(row["batch_size"]), lambda rows, index=index: rows[index], show_speed)
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
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # numbers cover the line
    figures.draw_rates(axis, drawn, padding=2, fontsize=6.8, bbox=box)
    ceiling = results["gemm_macs_per_second"] / results["macs_per_image"]
    axis.axhline(ceiling, color="#444444", lw=1, ls="--", zorder=0.9)
    axis.annotate(
        f"rate of a large INT8 matrix product, dense: {ceiling:.0f}", (-0.42, ceiling),
        xytext=(0, 4), textcoords="offset points", fontsize=8.5,
    )  # fmt: skip
    threads = report.counted(results["environment"]["threads"], "thread")
    axis.set_title(f"INT8 on {results['environment']['cpu']}, {threads}")
    axis.margins(x=0.01, y=0.3)
    axis.legend(loc="upper left", ncols=4, fontsize=8.5)
    figures.save_figure(figure, path, [{"latency": results["rows"]}])
