"""Accuracy in training, which a checkpoint keeps epoch by epoch; files and report of a run."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

from common.checkpoints.checkpoint import WEIGHTS_NAME, WeightsFile, save_checkpoint
from common.command.cli import UserError, log
from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.files.untrusted import read_untrusted
from common.images.data import ImageSet, balanced_subset, checksum
from common.measure.evaluate import measure_accuracy, predict
from common.report import figures
from common.report import results as report
from common.report.results import counted, percent
from common.report.story import Column, Story, Table
from training.loop.fit import EpochSummary, TrainingState
from training.recipe import Recipe

CHECKPOINT_NAME = "checkpoint.pt"
HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500
EPOCHS_NAME, EPOCHS_PLOT = "epochs.csv", "curves.png"


def identify(recipe: Recipe, seed: int, processes: int, train: ImageSet) -> dict[str, object]:
    """Return what decides the weights, by name; images by their SHA-256."""
    return {
        SCRIPT: "training",
        **asdict(recipe),
        "seed": seed,
        "processes": processes,
        "training images": checksum((train.labels, train.images)),
    }


class EpochRecorder:
    """Measures held-out accuracy and saves a checkpoint, as ``after_epoch`` of :func:`fit`."""

    def __init__(self, held_out: ImageSet, epochs: int, checkpoint: Path):
        self.held_out, self.epochs, self.checkpoint = held_out, epochs, checkpoint
        self.rows: list[EpochSummary] = []

    def __call__(self, state: TrainingState, summary: EpochSummary) -> None:
        """Measure after an epoch, and save all epochs so far."""
        accuracy = measure_accuracy(find_correct(state.model.eval(), self.held_out)).value
        row = replace(summary, held_out_accuracy=accuracy)
        self.rows.append(row)
        log.info(
            "epoch %*d/%d  loss %.3f  held-out %s  %.1f s",
            len(str(self.epochs)), row.epoch, self.epochs, row.loss, percent(accuracy), row.seconds,
        )  # fmt: skip
        content = {"rows": [asdict(row) for row in self.rows], "tensors": state.tensors()}
        save_checkpoint(content, self.checkpoint)

    def resume(self, state: TrainingState) -> None:
        """Load the checkpoint into ``state``, if there is one; a UserError if it does not fit."""
        if not self.checkpoint.exists():
            return
        try:
            saved = read_untrusted(self.checkpoint)
            rows = [EpochSummary(**row) for row in saved["rows"]]
            if [row.epoch for row in rows] != [*range(1, len(rows) + 1)]:
                raise ValueError("its epochs are out of order")
            state.load(saved["tensors"], len(rows))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            is_told = isinstance(error, UserError)
            reason = error if is_told else f"{self.checkpoint}: damaged ({error})"
            raise UserError(f"{reason}; start anew with --overwrite instead") from None
        self.rows = rows
        log.info("resumed after epoch %d of %d", state.epochs_done, self.epochs)


def split_held_out(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into those to train on and ``count`` class-balanced held-out ones."""
    if count >= len(images):
        raise UserError(f"{count} held-out images leave none of {len(images)} to train on")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[balanced_subset(images.labels.cpu().numpy(), count, HELD_OUT_SEED)] = True
    return images.rows(~held), images.rows(held)


def describe_accuracy(model: nn.Module, held_out: ImageSet, test: ImageSet) -> dict:
    """Return results.json's accuracies: held-out, test, and test by class."""
    correct, labels = find_correct(model, test), test.labels.cpu()
    by_class = {
        name: measure_accuracy(correct[labels == label]).as_dict()
        for label, name in enumerate(test.classes)
        if (labels == label).any()
    }
    return {
        "held_out": measure_accuracy(find_correct(model, held_out)).as_dict(),
        "accuracy": measure_accuracy(correct).as_dict(),
        "per_class": by_class,
    }


def find_correct(model: nn.Module, images: ImageSet) -> torch.Tensor:
    """Return which images ``model``, in eval mode, classifies correctly: bool, shape (N,)."""
    return predict(model, images, PREDICT_BATCH) == images.labels.cpu()


def save_weights(model: nn.Module, folder: OutputFolder) -> dict:
    """Write a plain FP32 state dict; return results.json's ``weights``."""
    file = WeightsFile(folder.file(WEIGHTS_NAME), "this run")
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_checkpoint(state, file.path)
    return file.describe()


def save_epochs(rows: Sequence[EpochSummary], folder: OutputFolder) -> None:
    """Write the epochs as a table, and draw loss, accuracies and learning rate."""
    columns = [Column(f.name, attrgetter(f.name)) for f in fields(EpochSummary)]
    Table("", columns, rows).write_csv(folder.file(EPOCHS_NAME))
    figure, (loss_axes, accuracy_axes, rate_axes) = figures.new_figure(11, 3.6, columns=3)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 2 else None  # a line through one point shows nothing
    loss_axes.plot(epochs, [row.loss for row in rows], color=figures.BLUE, marker=marker)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    for name, label, colour in (
        ("train_accuracy", "training images, augmented", figures.GREY),
        ("held_out_accuracy", "held-out images", figures.ORANGE),
    ):
        percents = [100 * getattr(row, name) for row in rows]
        accuracy_axes.plot(epochs, percents, label=label, color=colour, marker=marker)
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="top-1 (%)")
    accuracy_axes.legend(loc="lower right", fontsize=8)
    rate_axes.plot(epochs, [row.learning_rate for row in rows], color=figures.RED, marker=marker)
    rate_axes.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    figures.save_figure(figure, folder.file(EPOCHS_PLOT))


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    rows = [{"images": "held-out", "accuracy": results["held_out"]},
            {"images": "test", "accuracy": results["accuracy"]}]  # fmt: skip
    columns = [
        Column("accuracy (FP32)", "images"),
        Column("top-1", "accuracy.value", percent),
        Column("95 % interval", "accuracy.ci95", lambda ci95: " … ".join(map(percent, ci95))),
        Column("images", "accuracy.total", "{:,}".format),
    ]
    classes = {name: entry["value"] for name, entry in results["per_class"].items()}
    worst, best = min(classes, key=classes.get), max(classes, key=classes.get)
    accuracy, epochs = results["accuracy"], results["recipe"]["epochs"]
    value, interval = report.format_accuracy(accuracy)
    return Story(
        "ResNet18, trained",
        report.describe_setting(results),
        [
            (value, f"top-1, {interval}"),
            (counted(epochs, "epoch"), f"of {results['data']['train_images']:,} images"),
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
