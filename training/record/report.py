"""What a training run shows: the plot of its epochs and the table for the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.command.cli import visible
from common.files.output import OutputFolder
from common.network.checkpoint import WEIGHTS_NAME
from common.report import results as report
from common.report.results import format_table, percent
from training.record.epochs import EpochRow

EPOCHS_NAME, EPOCHS_PLOT = "epochs.csv", "curves.png"


def save_epochs(rows: Sequence[EpochRow], folder: OutputFolder) -> dict:
    """Write the table and the plot of the epochs; return results.json's ``artifacts``."""
    report.write_csv(folder.file(EPOCHS_NAME), [asdict(row) for row in rows])
    plot_epochs(folder.file(EPOCHS_PLOT), rows)
    return {"model": WEIGHTS_NAME, "plots": [EPOCHS_PLOT], "epochs": EPOCHS_NAME}


def plot_epochs(path: Path, rows: Sequence[EpochRow]) -> None:
    """Draw loss, accuracies and learning rate by epoch as PNG."""
    figure, (loss_axes, accuracy_axes, rate_axes) = report.new_figure(11, 3.6, columns=3)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 2 else None  # a line through one point shows nothing
    loss_axes.plot(epochs, [row.loss for row in rows], color=report.BLUE, marker=marker)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    for values, label, colour in (
        ([row.train_accuracy for row in rows], "training images, augmented", report.GREY),
        ([row.held_out_accuracy for row in rows], "held-out images", report.ORANGE),
    ):
        percents = [100 * value for value in values]
        accuracy_axes.plot(epochs, percents, label=label, color=colour, marker=marker)
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="top-1 (%)")
    accuracy_axes.legend(loc="lower right", fontsize=8)
    rate_axes.plot(epochs, [row.learning_rate for row in rows], color=report.RED, marker=marker)
    rate_axes.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    report.save_figure(figure, path)


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out the run's outcome for the console."""

    def row(name: str, accuracy: dict) -> list[str]:
        low, high = accuracy["ci95"]
        return [
            name,
            percent(accuracy["value"]),
            f"{100 * low:.2f} – {100 * high:.2f}",
            f"{accuracy['total']:,}",
        ]

    rows = [row("held-out", results["held_out"]), row("test", results["accuracy"])]
    table = format_table(["accuracy (FP32)", "top-1", "95 % interval", "images"], rows)
    classes = {name: entry["value"] for name, entry in results["per_class"].items()}
    worst, best = min(classes, key=classes.get), max(classes, key=classes.get)
    return (
        f"{table}\n\n"
        f"test, by class: from {percent(classes[worst], 1)} ({worst}) to "
        f"{percent(classes[best], 1)} ({best})\n"
        f"written: {visible(output_dir / results['artifacts']['model'])}\n"
    )
