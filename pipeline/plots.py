"""The plot of pipeline.py: the frontier, accuracy against size and against images a second."""

from collections.abc import Callable
from pathlib import Path

from common.report import figures
from common.report import results as report
from pipeline.story import label, size_of

COLORS = {
    "int8": figures.GREY, "size": figures.BLUE, "speed": figures.ORANGE, "both": figures.GREEN,
}  # fmt: skip


def plot_frontier(results: dict, path: Path) -> None:
    """Plot every answer of results.json with its interval; by size, small, what was tried too."""
    figure, (small, fast) = figures.new_figure(11, 4.6, columns=2, sharey=True)
    shown = [*results["models"], *results["answers"]]
    fp32_bytes, timing = shown[0]["size_bytes"], shown[0]["latency"][-1]

    def times_smaller(entry: dict) -> float:
        return fp32_bytes / size_of(entry)

    def rate(entry: dict) -> float:
        return entry["latency"][-1]["images_per_second"]

    _plot_tried(small, results, times_smaller)
    for axis, position in ((small, times_smaller), (fast, rate)):
        _plot_answers(axis, results, position)
    for entry in shown:
        fast.annotate(
            report.doubt(entry["latency"][-1]), (rate(entry), -100 * entry["comparison"]["drop"]),
            xytext=(9, 7), textcoords="offset points", color=figures.RED, fontweight="bold",
        )  # fmt: skip
    small.set(xscale="log", title="How small", xlabel="times smaller than the FP32 file")
    ticks = (1, 2, 4, 8, 16, 32, 64, 128)
    small.set_xlim(0.75, 1.4 * max(*ticks, *map(times_smaller, shown)))
    small.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    small.set_xticks([], minor=True)
    small.set_ylabel("points against FP32")
    fast.set(title="How fast", xlabel=f"images a second at batch {timing['batch_size']}")
    fast.set_xlim(left=0)
    handles = small.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)
    figures.save_figure(figure, path, [{"latency": entry["latency"][-1:]} for entry in shown])


def _plot_tried(axis: object, results: dict, position: Callable[[dict], float]) -> None:
    lowest = -100 * max(4 * results["budget"]["max_drop"], 0.02)  # others lie at the plot's edge
    for trained, marker in ((False, "."), (True, "x")):
        tried = [entry for entry in results["tried"] if entry["trained"] is trained]
        for entry in tried:
            height = max(-100 * entry["comparison"]["drop"], lowest)
            axis.plot(position(entry), height, marker, color=COLORS[entry["goal"]], alpha=0.6, ms=7)
        if tried:
            name = f"tried{', trained' * trained}, in its goal's colour (images that choose)"
            axis.plot([], [], marker, color="black", alpha=0.6, ms=7, label=name)


def _plot_answers(axis: object, results: dict, position: Callable[[dict], float]) -> None:
    fp32, int8 = results["models"]
    axis.axhline(-100 * results["budget"]["max_drop"], color=figures.RED, lw=1, ls="--",
                 label="the budget")  # fmt: skip
    axis.plot(position(fp32), 0, "D", color="black", ms=7, label=label(fp32, results))
    for entry in [int8, *results["answers"]]:
        comparison = entry["comparison"]
        change, (low, high) = -100 * comparison["drop"], comparison["ci95"]
        axis.errorbar(
            position(entry), change,
            yerr=[[100 * high + change], [-100 * low - change]], fmt="o", ms=8, capsize=4, lw=1.6,
            color=COLORS[entry["name"]], label=f"{label(entry, results)}, 95 % interval",
        )  # fmt: skip
