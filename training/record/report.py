"""Files and report of a training run: weights, epochs and their plot, and the story."""

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from torch import nn

from common.files.output import OutputFolder
from common.network.checkpoint import WEIGHTS_NAME, WeightsFile, save_checkpoint
from common.report import results as report
from common.report.results import counted, percent
from common.report.story import Column, Headline, Story, Table
from training.record.measure import EpochRow

EPOCHS_NAME, EPOCHS_PLOT = "epochs.csv", "curves.png"
IMAGES = {"held-out": "held_out", "test": "accuracy"}  # and their entries in results.json


def save_weights(model: nn.Module, folder: OutputFolder) -> dict:
    """Write a plain FP32 state dict; return results.json's ``weights``."""
    file = WeightsFile(folder.file(WEIGHTS_NAME), "this run")
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_checkpoint(state, file.path)
    return file.describe()


def save_epochs(rows: Sequence[EpochRow], folder: OutputFolder) -> dict:
    """Write the table and the plot of the epochs; return results.json's ``artifacts``."""
    columns = [Column(f.name, attrgetter(f.name)) for f in fields(EpochRow)]
    Table("", columns, rows).write_csv(folder.file(EPOCHS_NAME))
    plot_epochs(folder.file(EPOCHS_PLOT), rows)
    return {"model": WEIGHTS_NAME, "plots": [EPOCHS_PLOT], "epochs": EPOCHS_NAME}


def plot_epochs(path: Path, rows: Sequence[EpochRow]) -> None:
    """Draw loss, accuracies and learning rate by epoch as PNG."""
    figure, (loss_axes, accuracy_axes, rate_axes) = report.new_figure(11, 3.6, columns=3)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 2 else None  # a line through one point shows nothing
    loss_axes.plot(epochs, [row.loss for row in rows], color=report.BLUE, marker=marker)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    for name, label, colour in (
        ("train_accuracy", "training images, augmented", report.GREY),
        ("held_out_accuracy", "held-out images", report.ORANGE),
    ):
        percents = [100 * getattr(row, name) for row in rows]
        accuracy_axes.plot(epochs, percents, label=label, color=colour, marker=marker)
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="top-1 (%)")
    accuracy_axes.legend(loc="lower right", fontsize=8)
    rate_axes.plot(epochs, [row.learning_rate for row in rows], color=report.RED, marker=marker)
    rate_axes.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    report.save_figure(figure, path)


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    rows = [{"images": name, "accuracy": results[key]} for name, key in IMAGES.items()]
    columns = [
        Column("accuracy (FP32)", lambda row: row["images"]),
        Column("top-1", lambda row: row["accuracy"]["value"], percent),
        Column("95 % interval", lambda row: " … ".join(map(percent, row["accuracy"]["ci95"]))),
        Column("images", lambda row: row["accuracy"]["total"], "{:,}".format),
    ]
    classes = {name: entry["value"] for name, entry in results["per_class"].items()}
    worst, best = min(classes, key=classes.get), max(classes, key=classes.get)
    accuracy, epochs = results["accuracy"], results["recipe"]["epochs"]
    value, interval = report.format_accuracy(accuracy)
    return Story(
        "ResNet18, trained",
        report.describe_setting(results),
        [
            Headline(value, f"top-1, {interval}"),
            Headline(counted(epochs, "epoch"), f"of {results['data']['train_images']:,} images"),
        ],
        [
            Table("", columns, rows),
            f"By class, on the test images: from {percent(classes[worst], 1)} ({worst}) to "
            f"{percent(classes[best], 1)} ({best}).",
            f"The weights are in {results['artifacts']['model']}.",
        ],
        {EPOCHS_PLOT: "Loss, accuracies and learning rate by epoch."},
        report.format_cost(results),
    )
