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
    from common import checkpoint, data, device, output, report, sources
    from common.html_report import add_report
    from pipeline import plots, stages, story, tables
    from quantization import engines

    device.set_threads(args.threads)
    device.keep_freed_memory()
    fp32_device = device.choose_device(args.device)
    settings = engines.choose_settings(args.engine)
    with output.OutputFolder(args.output_dir, args.overwrite) as folder:
        weights = checkpoint.find_weights(args.weights, Path(__file__).parent)
        cli.log.info("weights: %s", weights.found)
        dense = checkpoint.load_model(weights.path)
        source = sources.open_source(args.data_dir, args.bundled, not args.no_bundled)
        test = data.load_images(source, "test", args.test_images, args.seed)
        calibration = data.load_images(source, "train", args.calibration_images, args.seed)
        cli.log.info("images: %d for testing, %d for calibration, from %s",
                     len(test), len(calibration), source.description)  # fmt: skip
        images = {
            "source": source.name,
            "test_images": len(test),
            "calibration_images": len(calibration),
        }
        results = report.common_results("pipeline", args, fp32_device, images, weights)
        results["processes"] = 1

        bench = stages.Bench(folder, test, calibration, fp32_device, args.batch_size)
        compressed = [
            bench.measure_fp32("dense", dense),
            bench.measure_int8("dense-int8", dense, settings),
        ]
        pruned = stages.prune(dense, args.sparsity, args.allocation)
        compressed.append(bench.measure_fp32("pruned", pruned, keep=not args.recalibrate_bn))
        if args.recalibrate_bn:
            pruned = stages.recalibrate(pruned, calibration)
            compressed.append(bench.measure_fp32("pruned-recalibrated", pruned, keep=True))
        compressed.append(bench.measure_int8("pruned-int8", pruned, settings, keep=True))
        timings = bench.time(compressed, args.batch_sizes, args.timing_seconds)
        results["stages"] = stages.describe(compressed, test.labels, timings)

        plots.plot_pipeline(results["stages"], folder.file(PLOT))
        results["artifacts"] = {
            "model": stages.INT8_PACKED_NAME,
            "models": [*folder.names(".pth"), *folder.names(".safetensors")],
            "plots": [PLOT],
        }
        results |= report.run_cost(started)
        if args.report:
            add_report(results, story.tell(results), folder)
        report.write_json(folder.file(output.RESULTS_NAME), results)
        folder.commit()
    text = tables.format_results(results, args.output_dir)
    print(report.to_json(results) if args.json else text, end="")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
