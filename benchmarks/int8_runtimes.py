"""Compare our INT8 model with other runtimes: same weights, same images, equal threads.

    python benchmarks/int8_runtimes.py --bundled --threads 2
    python benchmarks/int8_runtimes.py --weights my.pth --data-dir ~/cifar10

Every runtime gets the same FP32 weights and calibration images; all of them are timed in turns, in
one process, on the CPU. docs/runtimes.md has a run, and what was tried to be faster.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli


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
    from benchmarks import runtimes, runtimes_report
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
            predictions = {name: setup.predict(row.run, name) for name, row in rows.items()}
            contenders = [Contender(name, x.run, x.memory_format) for name, x in rows.items()]
            images = test.normalize(test.images[: max(args.batch_sizes)])
            timings = time_interleaved(contenders, images, args.batch_sizes, args.timing_seconds)
        correct = {name: classes == test.labels for name, classes in predictions.items()}
        accuracies = {name: measure_accuracy(found).value for name, found in correct.items()}

        results = common_results("int8_runtimes", args, workers, inputs.describe())
        results["rows"] = [
            {
                "runtime": name, **timing.as_dict(), "accuracy": accuracies[name],
                "size_bytes": row.size_bytes,
            }
            for name, row in rows.items() for timing in timings[name]
        ]  # fmt: skip
        runtimes_report.plot(results, folder.file(runtimes_report.PLOT))
        finish_run(results, folder, started, runtimes_report.tell, args)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
