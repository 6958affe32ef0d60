"""Compare this project's answers with what other tools make of the same network, untrained.

    python pipeline/pipeline.py --bundled
    python benchmarks/compression_peers.py --bundled

Rows: NNCodec (ISO/IEC 15938-17), Torch-Pruning (magnitude, batch norms estimated again where that
helps, then made INT8 here), ONNX Runtime's own quantizer with zstd, and the answers of pipeline.py.
All of them see the same weights and calibration images; they are evaluated on the images that
pipeline.py did not choose on, and timed in turns. docs/peers.md has runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import NNCODEC, ONNX_RUNTIME, OURS, TORCH_PRUNING
from common.command import argument_types, arguments, cli
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


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, "compression_peers", with_device=False)
    parser.set_defaults(test_images="all")
    parser.add_argument(
        "--pipeline", type=argument_types.path, metavar="DIR",
        default=cli.WORKSPACE / "results" / "pipeline",
        help="results of pipeline.py for the same network, test images and seed",
    )  # fmt: skip
    arguments.add_calibration_argument(parser, 1000)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32], seconds=5.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, compress by every tool, evaluate, time in turns, write."""
    args = arguments.parse_arguments(build_parser(), argv, {})
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from benchmarks import peers
    from common.inputs import load_inputs
    from common.measure.evaluate import Paired, measure_accuracy
    from common.measure.latency import Contender, time_interleaved
    from common.network.size import saved_size_bytes
    from common.run import common_results, finish_run, start_run
    from quantization.int8 import engines
    from quantization.steps import CalibrationSetup

    with start_run(args) as (workers, folder), tempfile.TemporaryDirectory() as files:
        settings = engines.choose_settings(engines.fastest_engine())
        inputs = load_inputs(args, Path(__file__).parent)
        _, confirming = map(inputs.test.rows, inputs.test.halves(args.seed))
        setup = CalibrationSetup(inputs.calibration, confirming, args.batch_size)
        fp32 = engines.fp32_runner(inputs.traced.network)
        dense = setup.predict(fp32, "dense FP32") == confirming.labels
        rows, contenders = [], []
        for made in peers.compress(inputs, settings, args.batch_size, args.pipeline, Path(files)):
            name = f"{made.method}, {made.setting}"
            correct = setup.predict(made.run, name) == confirming.labels
            row = {"method": made.method, "setting": made.setting, "size_bytes": made.size_bytes}
            rows.append(row | Paired.of(dense, correct).as_dict())
            if made.timed:
                contenders.append(Contender(name, made.run))
        images = confirming.normalize(confirming.images[: max(args.batch_sizes)])
        timings = time_interleaved(contenders, images, args.batch_sizes, args.timing_seconds)
        for row in rows:
            if timed := timings.get(f"{row['method']}, {row['setting']}"):
                row["latency"] = [timing.as_dict() for timing in timed]

        results = common_results("compression_peers", args, workers, inputs.describe())
        results["fp32"] = {
            "size_bytes": saved_size_bytes(inputs.model.state_dict()),
            "accuracy": measure_accuracy(dense).as_dict(),
        }
        results["rows"] = rows
        plot(results, folder.file(PLOT))
        finish_run(results, folder, started, tell, args)
    return cli.EXIT_DONE


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    rows, fp32 = results["rows"], results["fp32"]
    timed = [row for row in rows if "latency" in row]  # some: the answers of pipeline.py are
    latency = timed[0]["latency"]

    def times_smaller(row: dict) -> float:
        return fp32["size_bytes"] / row["size_bytes"]

    columns = [
        Column("", lambda row: f"{row['method']}, {row['setting']}", name="method"),
        Column("MB", lambda row: row["size_bytes"] / 1e6, "{:.2f}".format),
        Column("smaller", times_smaller, "{:.1f}×".format),
        *report.accuracy_columns(),
        *report.change_columns(),
        *report.rate_columns(latency),
    ]
    note = (
        "At a batch size: INT8 images a second. NNCodec's networks run as the dense one does."
        + report.explain_doubt(timed)
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
            f"Fastest within one point at batch {latency[-1]['batch_size']}: {fastest}.",
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
    fp32_bytes = results["fp32"]["size_bytes"]
    timed = [row for row in results["rows"] if "latency" in row]

    def height(row: dict) -> float:
        return max(-100 * row["comparison"]["drop"], LOWEST_POINTS)

    for axis, shown, position in (
        (axes[0], results["rows"], lambda row: fp32_bytes / row["size_bytes"]),
        (axes[1], timed, lambda row: row["latency"][-1]["images_per_second"]),
    ):
        for method, color in COLORS.items():
            own = sorted((row for row in shown if row["method"] == method), key=position)
            line = "o" if method in (OURS, ONNX_RUNTIME) else "o-"
            axis.plot([*map(position, own)], [*map(height, own)], line, color=color, label=method)
            for row in own if method == OURS else ():
                goal = row["setting"].partition(",")[0]
                axis.annotate(
                    goal, (position(row), height(row)), ha="center",
                    xytext=(0, -15 if goal == "size" else 7),  # it lies close to both
                    textcoords="offset points",
                )  # fmt: skip
        axis.axhline(-100 * WITHIN, color=figures.GREY, lw=1, ls="--", label="one point lost")
    ticks = [2**power for power in range(2, 8)]
    axes[0].set(xscale="log", title="Size", xlabel="times smaller than FP32",
                ylabel=f"points against FP32 (lower ones at {LOWEST_POINTS:g})")  # fmt: skip
    axes[0].set_xlim(3.5, 160)
    axes[0].set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes[0].set_xticks([], minor=True)
    batch_size = timed[0]["latency"][-1]["batch_size"]
    axes[1].set(title="Speed", xlabel=f"INT8 images a second at batch {batch_size}")
    axes[1].legend(loc="best")
    figures.save_figure(figure, path, timed)


if __name__ == "__main__":
    sys.exit(main())
