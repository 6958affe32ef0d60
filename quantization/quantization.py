"""Quantize a ResNet18 for CIFAR-10 to INT8 and measure what that gains and costs.

    python quantization.py                      # bundled weights or your resnet18_cifar10.pth
    python quantization.py --weights my.pth --data-dir ~/cifar10 --test-images all

Loads the pretrained network, measures its size and accuracy, calibrates and converts it to INT8
(post-training static quantization, fbgemm by default), measures again on the same images, and
times both. Writes the INT8 model, reloads it in a fresh process, and writes results.json and plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import cli

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "quantization"
OVERVIEW_PLOT = "overview.png"
RANGES_PLOT = "ranges.png"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python quantization.py\n"
        "  python quantization.py --weights my.pth --data-dir ~/cifar10 --test-images all",
        formatter_class=cli.HelpFormatter,
    )
    cli.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR)
    quantizing = parser.add_argument_group("quantization")
    quantizing.add_argument(
        "--engines",
        type=cli.list_of(_engine),
        metavar="NAME,...",
        default=["fbgemm"],
        help="INT8 kernels to compare: fbgemm, x86, onednn or qnnpack",
    )
    quantizing.add_argument(
        "--calibration-images",
        type=cli.positive_int,
        metavar="N",
        default=512,
        help="training images that set the activations' ranges: class-balanced, seeded",
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--batch-sizes",
        type=cli.list_of(cli.positive_int),
        metavar="N,...",
        default=[1, 32, 128],
        help="batch sizes to time",
    )
    timing.add_argument(
        "--timing-seconds",
        type=cli.positive_float,
        metavar="S",
        default=5.0,
        help="time to spend on each batch size",
    )
    return parser


def _engine(name: str) -> str:
    # The list of quantization.engines, which cannot be imported before --help has answered.
    if name not in ("fbgemm", "x86", "onednn", "qnnpack"):
        raise argparse.ArgumentTypeError(f"unknown engine {name!r}")
    return name


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, measure, quantize, measure again, compare, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    from common import checkpoint, data, device, evaluate, output, report, sources
    from common.model import fold_batch_norm
    from quantization import engines, experiment, plots

    device.set_threads(args.threads)
    fp32_device = device.choose_device(args.device)
    settings = [engines.choose_settings(engine) for engine in args.engines]
    with output.OutputFolder(args.output_dir, args.overwrite) as folder:
        weights = checkpoint.find_weights(args.weights, Path(__file__).parent)
        cli.log.info("weights: %s", weights.found)
        model = checkpoint.load_model(weights.path)
        source = sources.open_source(args.data_dir, args.bundled, not args.no_bundled)
        test = data.load_images(source, "test", args.test_images, args.seed)
        calibration = data.load_images(source, "train", args.calibration_images, args.seed)
        cli.log.info("images: %d for testing, %d for calibration, from %s",
                     len(test), len(calibration), source.description)  # fmt: skip

        correct = experiment.measure_fp32(model, test, args.batch_size, fp32_device)
        quantized = [
            experiment.quantize(model, calibration, test, setting, args.batch_size)
            for setting in settings
        ]
        paths = [folder.file(artifact_name(engine)) for engine in args.engines]
        for candidate, path in zip(quantized, paths, strict=True):
            experiment.save_and_verify(candidate, path, test)
        timings = experiment.time_models(
            model, quantized, test, args.batch_sizes, args.timing_seconds
        )

        fp32, nchw = (
            experiment.fp32_entry(name, model, correct, timings[name])
            for name in (experiment.FP32, experiment.FP32_NCHW)
        )
        int8 = [
            experiment.int8_entry(candidate, path, timings[candidate.settings.engine])
            for candidate, path in zip(quantized, paths, strict=True)
        ]
        for entry, candidate in zip(int8, quantized, strict=True):
            accuracy = evaluate.compare(correct, candidate.correct)
            entry["comparison"] = experiment.compare_models(fp32, entry, accuracy)
            entry["speedup_over_nchw"] = experiment.speedups(nchw, entry)
        images = {
            "source": source.name,
            "test_images": len(test),
            "calibration_images": len(calibration),
        }
        results = report.common_results("quantization", args, fp32_device, images, weights)
        results["models"] = [nchw, fp32, *int8]
        results["comparison"] = int8[0]["comparison"]

        plots.plot_overview(results["models"], folder.file(OVERVIEW_PLOT))
        plots.plot_ranges(
            engines.weight_ranges(fold_batch_norm(model)),
            engines.activation_ranges(quantized[0].observed),
            folder.file(RANGES_PLOT),
        )
        results["artifacts"] = {"model": paths[0].name, "plots": [OVERVIEW_PLOT, RANGES_PLOT]}
        results["wall_seconds"] = time.perf_counter() - started
        report.write_json(folder.file(output.RESULTS_NAME), results)
        folder.commit()
    print(
        report.to_json(results) if args.json else format_results(results, args.output_dir), end=""
    )
    return cli.EXIT_DONE


def artifact_name(engine: str) -> str:
    """Return the file name of an engine's INT8 model; fbgemm's is the plain one."""
    stem = "resnet18_cifar10_int8"
    return f"{stem}.pth" if engine == "fbgemm" else f"{stem}_{engine}.pth"


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out results.json's story for a terminal 80 columns wide."""
    from common.report import format_table, megabytes, percent, points
    from quantization.plots import label

    batch_sizes = [entry["batch_size"] for entry in results["models"][0]["latency"]]
    rows = [
        [
            label(model),
            megabytes(model["size_bytes"]),
            percent(model["accuracy"]["value"]),
            *(f"{entry['images_per_second']:,.0f}" for entry in model["latency"]),
        ]
        for model in results["models"]
    ]
    environment = results["environment"]
    lines = [
        f"ResNet18 on CIFAR-10: {results['models'][0]['accuracy']['total']:,} test images "
        f"({results['data']['source']}), {environment['cpu']}, {environment['threads']} threads",
        "",
        format_table(
            ["images/s at", "size", "accuracy", *(f"batch {size}" for size in batch_sizes)], rows
        ),
    ]
    for model in results["models"]:
        if model["name"] != "int8":
            continue
        comparison, accuracy = model["comparison"], model["comparison"]["accuracy"]
        low, high = (points(-limit) for limit in reversed(accuracy["ci95"]))
        lines += [
            "",
            f"{label(model)} against FP32 on the same images",
            f"  size      {percent(1 - comparison['size_ratio'], 1)} smaller "
            f"({1 / comparison['size_ratio']:.2f}×)",
            f"  accuracy  {points(-accuracy['drop'])} points, 95 % interval {low} to {high} "
            f"(McNemar p = {accuracy['mcnemar_p']:.2g})",
            f"            {accuracy['only_a_correct']} images lost, "
            f"{accuracy['only_b_correct']} gained",
            "  speed     "
            + ", ".join(
                f"{best['value']:.2f}× at batch {best['batch_size']}"
                for best in comparison["speedup"]
            )
            + " (FP32 at its best)",
            "            "
            + ", ".join(f"{entry['value']:.2f}×" for entry in model["speedup_over_nchw"])
            + " against FP32 as usually written",
            f"  coverage  {len(model['int8_operations'])} operations, all INT8",
        ]
    lines += ["", f"written to {output_dir} in {results['wall_seconds']:.0f} s"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
