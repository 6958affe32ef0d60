"""Which calibration is good enough: accuracy over observers, numbers of images and seeds.

    python benchmarks/calibration_study.py --bundled

Quantizes with every observer, on 32, 128 and 512 images, with three seeds each. What decides is how
many answers are FP32's, right or wrong: an INT8 model that beats FP32 does so by luck.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from quantization.settings import ENGINES, OBSERVERS, Settings

if TYPE_CHECKING:
    import torch

    from common.images.data import Cifar10
    from common.images.sources import Source
    from common.network.resnet import ResNet18

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "calibration_study"
PLOT = "calibration_study.png"
STUDY_SIZES = (32, 128, 512)
STUDY_SEEDS = (0, 1, 2)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog="examples:\n"
        "  python benchmarks/calibration_study.py --bundled\n"
        "  python benchmarks/calibration_study.py --data-dir ~/cifar10 --engine onednn",
    )
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR, with_report=False)
    parser.add_argument(
        "--engine", choices=ENGINES, default="fbgemm", help="INT8 kernels to measure with"
    )
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, read all calibration images, quantize again and again, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)

    from common.files.output import RESULTS_NAME, OutputFolder
    from common.inputs import load_inputs
    from common.machine import device
    from common.machine.workers import ALONE
    from common.measure.evaluate import measure_accuracy, predict
    from common.report import results as report
    from quantization.int8.engines import choose_settings

    device.set_threads(args.threads)
    settings = choose_settings(args.engine)
    with OutputFolder(args.output_dir, args.overwrite) as folder:
        inputs = load_inputs(**arguments.input_choices(args), script_dir=Path(__file__).parent)
        train = read_calibration(inputs.source)
        fp32 = predict(inputs.model, inputs.test, args.batch_size, "evaluate FP32")
        rows = run_study(inputs.model, train, inputs.test, fp32, settings, args.batch_size)
        dense = measure_accuracy(fp32 == inputs.test.labels)
        results = report.common_results(
            "calibration_study", args, ALONE, inputs.describe_images(), inputs.weights
        )
        results |= {"fp32": dense.as_dict(), "rows": as_dicts(rows)}
        results["artifacts"] = {"plots": [PLOT]}
        plot_study(rows, dense.value, folder.file(PLOT))
        report.write_json(folder.file(RESULTS_NAME), results)
        folder.commit()
    print(report.to_json(results) if args.json else format_study(rows, dense.value), end="")
    return cli.EXIT_DONE


@dataclass(frozen=True)
class StudyRow:
    """What INT8 gives with one observer and number of images, over seeds; fractions of images.

    Attributes:
        observer: Its name.
        calibration_images: Their number.
        accuracies: One a seed.
        agreements: The share of images that get FP32's answer, right or wrong; one a seed.
    """

    observer: str
    calibration_images: int
    accuracies: tuple[float, ...]
    agreements: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The distance from the worst to the best seed."""
        return max(self.accuracies) - min(self.accuracies)


def read_calibration(source: Source) -> dict[int, Cifar10]:
    """Return for each seed the largest calibration set; its first images are the smaller ones'.

    The training split is opened once: that of image folders takes seconds to list.
    """
    import torch

    from common.images.data import Cifar10, balanced_subset

    split, found = source.open_split("train"), {}
    for seed in STUDY_SEEDS:
        indices = balanced_subset(split.labels, max(STUDY_SIZES), seed)
        pixels, labels = split.read(indices), split.labels[indices]
        found[seed] = Cifar10(torch.from_numpy(pixels), torch.from_numpy(labels))
    return found


def run_study(
    model: ResNet18,
    train: dict[int, Cifar10],
    test: Cifar10,
    fp32: torch.Tensor,
    settings: Settings,
    batch_size: int,
) -> list[StudyRow]:
    """Quantize with every observer, number of calibration images and seed; measure each.

    Args:
        model: FP32.
        train: For each seed the calibration images; smaller numbers take the first of them.
        test: Images to measure on.
        fp32: FP32's predictions on them (int64, shape (N,)).
        settings: Of the quantization, but for the observer.
        batch_size: In images.
    """
    from quantization.bench import Bench
    from quantization.int8 import conversion

    rows = []
    cells = list(itertools.product(OBSERVERS, STUDY_SIZES))
    for observer, size in cli.progress(cells, "calibration study", unit="cell"):
        accuracies, agreements = [], []
        for seed in STUDY_SEEDS:
            chosen = replace(settings, observer=observer)
            bench = Bench(train[seed].rows(slice(size)), test, batch_size)
            converted = conversion.convert(bench.calibrate(model, chosen), chosen)
            predictions = bench.predict(converted, "evaluate INT8")
            accuracies.append(float((predictions == test.labels).double().mean()))
            agreements.append(float((predictions == fp32).double().mean()))
        rows.append(StudyRow(observer, size, tuple(accuracies), tuple(agreements)))
    return rows


def best_row(rows: Sequence[StudyRow]) -> StudyRow:
    """Return the row that the study supports: where the worst seed agrees most with FP32.

    Not the most accurate: an INT8 model that beats FP32 does so by luck, which new images do not
    repeat, and agreement tells settings apart that accuracy cannot.
    """
    return max(rows, key=lambda row: (min(row.agreements), -row.calibration_images))


def as_dicts(rows: Sequence[StudyRow]) -> list[dict]:
    """Return results.json's ``rows``."""
    return [asdict(row) | {"mean": row.mean, "spread": row.spread} for row in rows]


def format_study(rows: Sequence[StudyRow], fp32_accuracy: float) -> str:
    """Lay out the study as a table, and say what it supports."""
    from common.report import results as report

    table = report.format_table(
        ["observer", "images", "mean", "spread", "drop", "as FP32", "worst seed"],
        [
            [
                row.observer,
                f"{row.calibration_images}",
                report.percent(row.mean),
                f"{100 * row.spread:.2f}",
                f"{100 * (fp32_accuracy - row.mean):+.2f}",
                report.percent(statistics.mean(row.agreements)),
                report.percent(min(row.agreements)),
            ]
            for row in rows
        ],
    )
    best = best_row(rows)
    return (
        f"calibration study: accuracy, and answers that are FP32's, right or wrong\n"
        f"({len(STUDY_SEEDS)} seeds; spread and drop in points)\n{table}\n"
        f"most like FP32 at its worst: {best.observer} on {best.calibration_images} images\n"
    )


def plot_study(rows: Sequence[StudyRow], fp32_accuracy: float, path: Path) -> None:
    """Plot accuracy and agreement by calibration images: one line an observer, one dot a seed."""
    import numpy as np

    from common.report import results as report

    figure, (left, right) = report.new_figure(11, 4.2, columns=2)
    left.axhline(100 * fp32_accuracy, color="black", lw=1, ls="--", label="FP32")
    colors = (report.BLUE, report.ORANGE, report.GREEN, report.RED)
    for position, (observer, color) in enumerate(zip(OBSERVERS, colors, strict=True)):
        own = [row for row in rows if row.observer == observer]
        x = np.arange(len(own)) + (position - 1.5) * 0.08
        for axis, seeds in (
            (left, [row.accuracies for row in own]),
            (right, [row.agreements for row in own]),
        ):
            means = [100 * statistics.mean(values) for values in seeds]
            axis.plot(x, means, "-", color=color, label=observer)
            for at, values in zip(x, seeds, strict=True):
                points = [100 * value for value in values]
                axis.plot([at] * len(points), points, "o", color=color, ms=4, alpha=0.8)
    left.set(title="INT8 accuracy by calibration", ylabel="top-1, %")
    right.set(title="Answers that are FP32's, right or wrong", ylabel="of all images, %")
    for axis in (left, right):
        axis.set_xticks(range(len(STUDY_SIZES)), [str(size) for size in STUDY_SIZES])
        axis.set_xlabel("calibration images")
    left.legend(ncols=2, fontsize=8)
    report.save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
