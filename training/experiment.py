"""The steps of training.py, from all images to the entries of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import cli, evaluate, report
from common.checkpoint import WEIGHTS_NAME, WeightsFile, save_checkpoint
from common.cifar10 import CLASSES, IMAGE_SIZE
from common.cli import UserError
from common.data import Cifar10, balanced_subset
from common.output import OutputFolder
from common.workers import Workers
from training.augment import resize
from training.averaging import averaged_model
from training.curves import plot_curves
from training.fit import EpochSummary, fit
from training.journal import EPOCHS_NAME, EpochRow, Journal, write_epochs
from training.precision import autocast
from training.recipe import Recipe
from training.state import TrainingState

HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500
# Which of the two is written is decided on the held-out images; of equals, the first.
AVERAGED, LAST = "averaged", "last"
CURVES_PLOT = "curves.png"


def split_held_out(images: Cifar10, count: int) -> tuple[Cifar10, Cifar10]:
    """Return the images to train on and ``count`` class-balanced ones to make choices on.

    Raises:
        UserError: That would leave none to train on.
    """
    if count >= len(images):
        raise UserError(f"{count} held-out images leave none of {len(images)} to train on")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[balanced_subset(images.labels.cpu().numpy(), count, HELD_OUT_SEED)] = True
    parts = (Cifar10(images.images[part], images.labels[part]) for part in (~held, held))
    return tuple(parts)


class EpochMeter:
    """Measures an epoch's weights and their average, notes it in the journal, and saves.

    Args:
        train: For the average's batch-norm statistics.
        held_out: To measure on, at the size of the epoch's images.
        recipe: Of the run.
        seed: Of the run.
        journal: Takes the rows.
        save_every: Epochs between checkpoints; the last epoch is always saved.
    """

    def __init__(
        self,
        train: Cifar10,
        held_out: Cifar10,
        recipe: Recipe,
        seed: int,
        journal: Journal,
        save_every: int,
    ):
        self.train, self.held_out = train, held_out
        self.recipe, self.seed = recipe, seed
        self.journal, self.save_every = journal, save_every

    def __call__(self, state: TrainingState, summary: EpochSummary) -> None:
        """Take in one epoch (``after_epoch`` of :func:`training.fit.fit`)."""
        size = summary.image_size
        averaged = averaged_model(state, self.train, self.recipe, self.seed, size)
        row = EpochRow(
            **asdict(summary),
            held_out_accuracy=self._accuracy(state.model.eval(), size),
            averaged_accuracy=self._accuracy(averaged, size),
        )
        self.journal.rows.append(row)
        _announce(row, self.recipe)
        if row.epoch % self.save_every == 0 or row.epoch == self.recipe.epochs:
            self.journal.save(state)

    def _accuracy(self, model: nn.Module, size: int) -> float:
        shrunk = resize(self.held_out.images, size).permute(0, 3, 1, 2)
        images = Cifar10(shrunk, self.held_out.labels)
        with autocast(self.recipe.precision, shrunk.device):
            return evaluate.measure_accuracy(_correct(model, images)).value


def _announce(row: EpochRow, recipe: Recipe) -> None:
    size = f"  {row.image_size} px" if recipe.start_size != IMAGE_SIZE else ""
    cli.log.info(
        "epoch %*d/%d%s  loss %.3f  held-out %s  averaged %s  %.1f s",
        len(str(recipe.epochs)), row.epoch, recipe.epochs, size, row.loss,
        report.percent(row.held_out_accuracy), report.percent(row.averaged_accuracy), row.seconds,
    )  # fmt: skip


def open_journal(
    output_dir: Path,
    settings: dict,
    state: TrainingState,
    resume: bool,
    overwrite: bool,
    workers: Workers,
) -> Journal:
    """Begin a journal, or take up that of an unfinished run, its state too.

    Raises:
        UserError: There is one and it is not to be resumed, or there is none that can be.
    """
    journal = Journal(output_dir, settings)
    if resume:
        journal.resume(state)
        cli.log.info("resumed after epoch %d of %d", state.epochs_done, settings["epochs"])
    elif workers.is_first:
        journal.start(overwrite)
    return journal


def train_on(
    images: Cifar10,
    state: TrainingState,
    recipe: Recipe,
    seed: int,
    workers: Workers,
    meter: EpochMeter,
) -> None:
    """Train to the last epoch; the first of the ``workers`` measures and saves each.

    Raises:
        UserError: See :func:`training.fit.fit`.
    """
    after_epoch = meter if workers.is_first else None
    try:
        fit(state, images, recipe, seed, workers, after_epoch=after_epoch)
    except KeyboardInterrupt:
        if workers.is_first and meter.journal.checkpoint.exists():
            cli.log.warning("unfinished: the same command with --resume goes on")
        raise


def choose(
    state: TrainingState, train: Cifar10, held_out: Cifar10, recipe: Recipe, seed: int
) -> tuple[nn.Module, dict]:
    """Choose between the last weights and their average by FP32 accuracy on held-out images.

    Returns:
        The network in eval mode, and its entry for results.json.
    """
    averaged = averaged_model(state, train, recipe, seed, count=len(train))
    candidates = {AVERAGED: averaged, LAST: state.model.eval()}
    accuracies = {
        name: evaluate.measure_accuracy(_correct(model, held_out))
        for name, model in candidates.items()
    }
    chosen = max(accuracies, key=lambda name: accuracies[name].correct)
    held_out_entries = {name: accuracy.as_dict() for name, accuracy in accuracies.items()}
    return candidates[chosen], {"chosen": chosen, "held_out": held_out_entries}


def measure_test(model: nn.Module, test: Cifar10) -> dict:
    """Return the entries of results.json that come from the test images."""
    correct, labels = _correct(model, test), test.labels.cpu()
    by_class = {
        name: evaluate.measure_accuracy(correct[labels == label]).as_dict()
        for label, name in enumerate(CLASSES)
        if (labels == label).any()
    }
    return {"accuracy": evaluate.measure_accuracy(correct).as_dict(), "per_class": by_class}


def save_weights(model: nn.Module, folder: OutputFolder) -> dict:
    """Write the weights in the course's layout: a plain FP32 state dict.

    Returns:
        results.json's ``weights``.
    """
    file = WeightsFile(folder.file(WEIGHTS_NAME), "this run")
    state = model.state_dict()
    save_checkpoint({name: value.cpu().contiguous() for name, value in state.items()}, file.path)
    return file.describe()


def save_epochs(rows: Sequence[EpochRow], folder: OutputFolder) -> dict:
    """Write the table and the plot of the epochs; return results.json's ``artifacts``."""
    write_epochs(folder.file(EPOCHS_NAME), rows)
    plot_curves(folder.file(CURVES_PLOT), rows)
    return {"model": WEIGHTS_NAME, "plots": [CURVES_PLOT], "epochs": EPOCHS_NAME}


def _correct(model: nn.Module, images: Cifar10) -> torch.Tensor:
    return evaluate.predict(model, images, PREDICT_BATCH) == images.labels.cpu()
