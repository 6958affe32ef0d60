"""Compare our INT8 model with other runtimes: same weights, same images, equal threads.

    python benchmarks/int8_runtimes.py --bundled --threads 2
    python benchmarks/int8_runtimes.py --weights my.pth --data-dir ~/cifar10

Every runtime gets the same FP32 weights and calibration images; all of them are timed in turns, in
one process, on the CPU. docs/runtimes.md has a run, and what was tried to be faster.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import ENGINE_PREFIX
from common.command import arguments, cli
from common.report import figures
from common.report import results as report
from common.report.story import Column, Story, Table

PLOT = "int8_runtimes.png"
OTHERS = {  # labels and colours of the runtimes that are not our engines, FP32 in grey
    "torch-fp32": ("torch FP32 at its best", "#D0D0D0"),
    "onnxruntime-fp32": ("ONNX Runtime FP32", "#A8A8A8"),
    "onnxruntime-int8": ("ONNX Runtime's quantizer", figures.ORANGE),
    "openvino-int8": ("NNCF + OpenVINO", figures.GREEN),
}
BLUES = ("#C6DBEF", "#9ECAE1", "#5AA9DC", "#3182BD", "#08519C")  # of our engines


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, "int8_runtimes", with_device=False)
    parser.set_defaults(batch_size=128)
    arguments.add_calibration_argument(parser)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 8, 32, 128], seconds=20.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, quantize everywhere, evaluate, time in turns, write."""
    args = arguments.parse_arguments(build_parser(), argv, {})
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from benchmarks import runtimes
    from common.inputs import load_inputs
    from common.measure.evaluate import measure_accuracy
    from common.measure.latency import Contender, time_interleaved
    from common.run import common_results, finish_run, start_run
    from quantization.steps import CalibrationSetup

    with start_run(args) as (workers, folder):
        inputs = load_inputs(args, Path(__file__).parent)
        test, network = inputs.test, inputs.traced.network
        with tempfile.TemporaryDirectory() as models:
            setup = CalibrationSetup(inputs.calibration, test, args.batch_size)
            rows = runtimes.make_rows(network, setup, Path(models))
            correct = {n: setup.predict(row.run, n) == test.labels for n, row in rows.items()}
            contenders = [Contender(name, x.run, x.memory_format) for name, x in rows.items()]
            images = test.normalize(test.images[: max(args.batch_sizes)])
            timings = time_interleaved(contenders, images, args.batch_sizes, args.timing_seconds)
        accuracies = {name: measure_accuracy(found).value for name, found in correct.items()}

        results = common_results("int8_runtimes", args, workers, inputs.describe())
        results["rows"] = [
            {
                "runtime": name, **timing.as_dict(), "accuracy": accuracies[name],
                "size_bytes": row.size_bytes,
            }
            for name, row in rows.items() for timing in timings[name]
        ]  # fmt: skip
        plot(results, folder.file(PLOT))
        finish_run(results, folder, started, tell, args)
    return cli.EXIT_DONE


def label(name: str) -> str:
    """Return a runtime's name as tables and plots show it."""
    return OTHERS[name][0] if name in OTHERS else f"ours: {name.removeprefix(ENGINE_PREFIX)}"


def by_runtime(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Return the rows of each runtime; they follow one another."""
    return {name: list(own) for name, own in itertools.groupby(rows, itemgetter("runtime"))}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    runtimes = by_runtime(results["rows"])
    ours = [rows for name, rows in runtimes.items() if name.startswith(ENGINE_PREFIX)]
    rates = itemgetter("images_per_second")
    best = [max(at_one_size, key=rates) for at_one_size in zip(*ours, strict=True)]
    fastest = [
        f"{row['runtime'].removeprefix(ENGINE_PREFIX)} at {row['batch_size']}" for row in best
    ]
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
    """Plot images a second by batch size."""
    figure, axis = figures.new_figure(11, 4.6)
    blues, drawn = iter(BLUES), []
    for name, rows in by_runtime(results["rows"]).items():
        color = OTHERS[name][1] if name in OTHERS else next(blues)
        drawn.append((label(name), color, rows))
    figures.draw_rates(axis, drawn, padding=2, fontsize=6.8)
    threads = report.counted(results["environment"]["threads"], "thread")
    axis.set_title(f"INT8 on {results['environment']['cpu']}, {threads}")
    axis.margins(x=0.01, y=0.3)
    axis.legend(loc="upper left", ncols=4, fontsize=8.5)
    figures.save_figure(figure, path, [{"latency": results["rows"]}])


if __name__ == "__main__":
    sys.exit(main())
