"""Held-out images while training, test images at its end."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from common.command import cli
from common.command.cli import UserError
from common.images.cifar10 import CLASSES
from common.images.data import Cifar10, balanced_subset
from common.measure import evaluate
from common.report.results import percent
from training.loop.fit import EpochSummary
from training.loop.state import TrainingState
from training.record.journal import EpochRow, Journal

HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500


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
    """Measures the network after an epoch, and saves both in the journal.

    Args:
        held_out: To measure on.
        epochs: Of the whole run.
        journal: Takes the rows.
    """

    def __init__(self, held_out: Cifar10, epochs: int, journal: Journal):
        self.held_out, self.epochs, self.journal = held_out, epochs, journal

    def __call__(self, state: TrainingState, summary: EpochSummary) -> None:
        """Take in one epoch (``after_epoch`` of :func:`training.loop.fit.fit`)."""
        accuracy = evaluate.measure_accuracy(find_correct(state.model.eval(), self.held_out)).value
        row = EpochRow(**asdict(summary), held_out_accuracy=accuracy)
        self.journal.rows.append(row)
        cli.log.info(
            "epoch %*d/%d  loss %.3f  held-out %s  %.1f s",
            len(str(self.epochs)), row.epoch, self.epochs, row.loss, percent(accuracy), row.seconds,
        )  # fmt: skip
        self.journal.save(state)


def describe_accuracy(model: nn.Module, held_out: Cifar10, test: Cifar10) -> dict:
    """Return results.json's accuracies: held-out, test, and test by class."""
    correct, labels = find_correct(model, test), test.labels.cpu()
    by_class = {
        name: evaluate.measure_accuracy(correct[labels == label]).as_dict()
        for label, name in enumerate(CLASSES)
        if (labels == label).any()
    }
    return {
        "held_out": evaluate.measure_accuracy(find_correct(model, held_out)).as_dict(),
        "accuracy": evaluate.measure_accuracy(correct).as_dict(),
        "per_class": by_class,
    }


def find_correct(model: nn.Module, images: Cifar10) -> torch.Tensor:
    """Return which images ``model``, in eval mode, classifies correctly: bool, shape (N,)."""
    return evaluate.predict(model, images, PREDICT_BATCH) == images.labels.cpu()
