"""Which calibration is good enough: accuracy over observers, numbers of images and seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import cli, evaluate, report
from common.data import Cifar10, batches, load_images
from common.model import ResNet18
from common.sources import Source
from quantization import conversion
from quantization.settings import OBSERVERS, Settings

STUDY_SIZES = (32, 128, 512)
STUDY_SEEDS = (0, 1, 2)


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


def run_study(
    model: ResNet18,
    source: Source,
    test: Cifar10,
    fp32: torch.Tensor,
    settings: Settings,
    batch_size: int,
) -> list[StudyRow]:
    """Quantize with every observer, number of calibration images and seed; measure each.

    Args:
        model: FP32.
        source: Of calibration images.
        test: Images to measure on.
        fp32: FP32's predictions on them (int64, shape (N,)).
        settings: Of the quantization, but for the observer.
        batch_size: In images.
    """
    train = {
        (size, seed): load_images(source, "train", size, seed)
        for size, seed in itertools.product(STUDY_SIZES, STUDY_SEEDS)
    }
    rows = []
    cells = list(itertools.product(OBSERVERS, STUDY_SIZES))
    for observer, size in cli.progress(cells, "calibration study", unit="cell"):
        accuracies, agreements = [], []
        for seed in STUDY_SEEDS:
            chosen = replace(settings, observer=observer)
            observed = conversion.calibrate(model, batches(train[size, seed], batch_size), chosen)
            predictions = evaluate.predict(conversion.convert(observed, chosen), test, batch_size)
            accuracies.append(accuracy_of(predictions, test))
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
    """Return results.json's ``calibration_study``."""
    return [asdict(row) | {"mean": row.mean, "spread": row.spread} for row in rows]


def accuracy_of(predictions: torch.Tensor, dataset: Cifar10) -> float:
    """Return the accuracy of predictions (int64, shape (N,)) as a fraction."""
    return evaluate.measure_accuracy(predictions == dataset.labels).value


def format_study(rows: Sequence[StudyRow], fp32_accuracy: float) -> str:
    """Lay out the study as a table, and say what it supports."""
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
