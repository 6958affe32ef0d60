"""Which calibration is good enough: accuracy over observers, numbers of images and seeds.

    python benchmarks/calibration_study.py --bundled
    python benchmarks/calibration_study.py --data-dir ~/cifar10 --engine onednn

Quantizes with every observer, on 32, 128 and 512 images, with three seeds each. What decides is how
many answers are FP32's, right or wrong: an INT8 model that beats FP32 does so by luck.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from quantization.settings import ENGINES, OBSERVERS

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "calibration_study"
STUDY_SIZES = (32, 128, 512)
STUDY_SEEDS = (0, 1, 2)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR, with_report=False, with_device=False)
    parser.add_argument(
        "--engine", choices=ENGINES, default="fbgemm", help="INT8 kernels to measure with"
    )
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, read all calibration images, quantize again and again, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    cli.import_torch()  # it takes seconds, so nothing that needs it is imported above
    from common.files.output import OutputFolder
    from common.images.data import load_images
    from common.inputs import load_inputs
    from common.machine import device
    from common.machine.workers import ALONE
    from common.measure.evaluate import measure_accuracy, predict
    from common.report.results import common_results
    from common.run import finish_run, print_results
    from quantization.int8.engines import require_engine

    device.set_up_cpu(args.threads)
    require_engine(args.engine)
    with OutputFolder(args.output_dir, args.overwrite) as folder:
        inputs = load_inputs(args, Path(__file__).parent)
        calibration = [
            load_images(inputs.source, "train", max(STUDY_SIZES), seed) for seed in STUDY_SEEDS
        ]
        fp32 = predict(inputs.model, inputs.test, args.batch_size, "evaluate FP32")
        results = common_results(
            "calibration_study", args, ALONE, inputs.describe_images(), inputs.weights
        )
        results["fp32"] = measure_accuracy(fp32 == inputs.test.labels).as_dict()
        results["rows"] = run_study(inputs, calibration, fp32, args.engine, args.batch_size)
        results["artifacts"] = {"plots": []}
        finish_run(results, folder, started)
    print_results(results, format_study(results["rows"], results["fp32"]["value"]), args.json)
    return cli.EXIT_DONE


def run_study(inputs, calibration: list, fp32, engine: str, batch_size: int) -> list[dict]:
    """Quantize with every observer, number of calibration images and seed; measure each.

    Args:
        inputs: The FP32 model, and images to measure on.
        calibration: For each seed the largest set; its first images are the smaller ones'.
        fp32: FP32's predictions (int64, shape (N,)).
        engine: Of the INT8 kernels.
        batch_size: In images.

    Returns:
        results.json's ``rows``; ``agreements`` are shares of images that get FP32's answer.
    """
    from quantization.bench import Bench

    from quantization.int8 import conversion, engines

    rows, cells = [], list(itertools.product(OBSERVERS, STUDY_SIZES))
    for observer, size in cli.progress(cells, "calibration study", unit="cell"):
        accuracies, agreements = [], []
        settings = engines.choose_settings(engine, observer)
        for images in calibration:
            bench = Bench(images.rows(slice(size)), inputs.test, batch_size)
            converted = conversion.convert(bench.calibrate(inputs.model, settings), settings)
            predictions = bench.predict(converted, "evaluate")
            accuracies.append(float((predictions == inputs.test.labels).double().mean()))
            agreements.append(float((predictions == fp32).double().mean()))
        rows.append(make_row(observer, size, accuracies, agreements))
    return rows


def make_row(
    observer: str, size: int, accuracies: Sequence[float], agreements: Sequence[float]
) -> dict:
    """Return the row of an observer and a number of images; one value a seed."""
    return {
        "observer": observer,
        "calibration_images": size,
        "accuracies": accuracies,
        "agreements": agreements,
        "mean": mean(accuracies),
        "spread": max(accuracies) - min(accuracies),
    }


def best_row(rows: Sequence[dict]) -> dict:
    """Return the row that the study supports: where the worst seed agrees most with FP32.

    Not the most accurate: an INT8 model that beats FP32 does so by luck, which new images do not
    repeat, and agreement tells settings apart that accuracy cannot.
    """
    return max(rows, key=lambda row: (min(row["agreements"]), -row["calibration_images"]))


def format_study(rows: Sequence[dict], fp32_accuracy: float) -> str:
    """Lay out the study as a table, and say what it supports."""
    from common.report.results import format_table, percent

    table = format_table(
        ["observer", "images", "mean", "spread", "drop", "as FP32", "worst seed"],
        [
            [
                row["observer"],
                f"{row['calibration_images']}",
                percent(row["mean"]),
                f"{100 * row['spread']:.2f}",
                f"{100 * (fp32_accuracy - row['mean']):+.2f}",
                percent(mean(row["agreements"])),
                percent(min(row["agreements"])),
            ]
            for row in rows
        ],
    )
    best = best_row(rows)
    return (
        f"calibration study: accuracy, and answers that are FP32's, right or wrong\n"
        f"({len(STUDY_SEEDS)} seeds; spread and drop in points)\n{table}\n"
        f"most like FP32 at its worst: {best['observer']} on {best['calibration_images']} images\n"
    )


if __name__ == "__main__":
    sys.exit(main())
