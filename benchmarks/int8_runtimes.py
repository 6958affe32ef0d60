"""Compare our INT8 model with other runtimes: same weights, same images, equal threads.

    python benchmarks/int8_runtimes.py --bundled --threads 2
    python benchmarks/int8_runtimes.py --slim results/pruning/resnet18_cifar10_slim.pth

Every runtime gets the same FP32 weights and calibration images; all of them are timed in turns, in
one process, on the CPU. The table shows images a second and, in brackets, the share of the rate
that a large INT8 matrix product reaches on the same cores. docs/runtimes.md has a run, and what was
tried to be faster.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import argument_types, arguments, cli

DEFAULT_OUTPUT_DIR = cli.WORKSPACE / "results" / "int8_runtimes"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR, with_device=False)
    parser.set_defaults(batch_size=128)
    parser.add_argument(
        "--slim", type=argument_types.path, metavar="FILE",
        help="checkpoint of narrower layers, for a row of its own",
    )  # fmt: skip
    arguments.add_calibration_argument(parser)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 8, 32, 128], seconds=20.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, quantize everywhere, evaluate, time in turns, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    cli.import_torch()  # it takes seconds, so nothing that needs it is imported above
    from benchmarks import runtimes, runtimes_report
    from common.inputs import load_inputs
    from common.measure.evaluate import measure_accuracy
    from common.measure.latency import Contender, time_interleaved
    from common.network import checkpoint
    from common.network.tracing import trace_network
    from common.run import common_results, finish_run, print_results, start_run
    from quantization.calibration import CalibrationSetup

    with start_run(args) as (workers, folder):
        inputs = load_inputs(args, Path(__file__).parent)
        test, networks = inputs.test, {"dense": inputs.traced.network}
        if args.slim is not None:
            networks["slim"] = trace_network(checkpoint.load_model(args.slim), test.shape)
        with tempfile.TemporaryDirectory() as models:
            setup = CalibrationSetup(inputs.calibration, test, args.batch_size)
            rows = runtimes.make_rows(networks, setup, Path(models))
            predictions = {name: setup.predict(row.run, name) for name, row in rows.items()}
            contenders = [Contender(name, x.run, x.memory_format) for name, x in rows.items()]
            images = test.normalize(test.images[: max(args.batch_sizes)])
            timings = time_interleaved(contenders, images, args.batch_sizes, args.timing_seconds)
        correct = {name: classes == test.labels for name, classes in predictions.items()}
        accuracies = {name: measure_accuracy(found).value for name, found in correct.items()}
        macs = {name: sum(network.macs.values()) for name, network in networks.items()}
        gemm_rate = runtimes.measure_gemm_rate()
        cli.log.info("INT8 GEMM: %.0f GMAC/s", gemm_rate / 1e9)

        results = common_results("int8_runtimes", args, workers, inputs.describe())
        results |= {"gemm_macs_per_second": gemm_rate, "macs_per_image": macs["dense"]}
        results["rows"] = runtimes_report.describe(rows, accuracies, timings, macs, gemm_rate)
        results["artifacts"] = {"plots": [runtimes_report.PLOT]}
        runtimes_report.plot(results, folder.file(runtimes_report.PLOT))
        told = finish_run(results, folder, started, runtimes_report.tell, args.report)
    print_results(results, told, args.output_dir, args.json)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
