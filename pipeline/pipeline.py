"""Compress a ResNet18 for CIFAR-10 twice: prune the whole network, then quantize what is left.

    python pipeline.py                          # bundled weights or your resnet18_cifar10.pth
    python pipeline.py --sparsity 0.85 --recalibrate-bn --data-dir ~/cifar10 --test-images all

Runs dense, pruned, and pruned and quantized with the code of pruning.py and quantization.py, and
says for each how large its file is, what it loses on the same images, and how fast it is. There is
no training anywhere. Every file is read back, and the accuracy is that of what was read.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, cli
from common.argument_types import fraction
from quantization.settings import ENGINES

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "pipeline"
PLOT = "pipeline.png"
# The choices of pipeline.stages, which imports torch.
ALLOCATIONS = ("global", "uniform")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog="examples:\n"
        "  python pipeline.py\n"
        "  python pipeline.py --sparsity 0.85 --recalibrate-bn --test-images all",
    )
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR)
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--sparsity", type=fraction, metavar="S", default=0.75,
        help="fraction of all convolution and linear weights to prune; pruning.py --scope all "
        "finds how far a network can go",
    )  # fmt: skip
    pruning.add_argument(
        "--allocation", choices=ALLOCATIONS, default="global",
        help="one magnitude threshold for the whole network, or the same amount of every layer",
    )  # fmt: skip
    pruning.add_argument(
        "--recalibrate-bn", action="store_true",
        help="re-estimate batch-norm statistics on the calibration images after pruning: a step "
        "and a row of its own",
    )  # fmt: skip
    quantizing = parser.add_argument_group("quantization")
    quantizing.add_argument("--engine", choices=ENGINES, default="fbgemm", help="INT8 kernels")
    arguments.add_calibration_argument(quantizing)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32], seconds=5.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, prune, quantize, write, read back, measure, compare."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    from common import device, report
    from common.inputs import load_inputs
    from common.run import finish_run, print_results, start_run
    from pipeline import plots, stages, story, tables
    from quantization import engines

    device.set_threads(args.threads)
    device.keep_freed_memory()
    place = device.choose_device(args.device)
    settings = engines.choose_settings(args.engine)
    with start_run(place, args.output_dir, args.overwrite) as (crew, folder):
        inputs = load_inputs(
            **arguments.input_choices(args), script_dir=Path(__file__).parent, workers=crew
        )
        bench = stages.Bench(folder, inputs.test, inputs.calibration, args.batch_size, crew)
        measured = stages.measure_all(
            bench, inputs.model, settings, args.sparsity, args.allocation, args.recalibrate_bn
        )
        if not crew.is_first:  # all that follows is timed and written once
            return cli.EXIT_DONE

        timings = bench.time(measured, args.batch_sizes, args.timing_seconds)
        results = report.common_results(
            "pipeline", args, crew, inputs.describe_images(), inputs.weights
        )
        results["stages"] = stages.describe(measured, inputs.test.labels, timings)
        plots.plot_pipeline(results["stages"], folder.file(PLOT))
        results["artifacts"] = {
            "model": stages.INT8_PACKED_NAME,
            "models": [*folder.names(".pth"), *folder.names(".safetensors")],
            "plots": [PLOT],
        }
        finish_run(results, folder, started, story.tell if args.report else None)
    print_results(results, tables.format_results(results, args.output_dir), args.json)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
