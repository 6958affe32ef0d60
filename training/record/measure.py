"""Accuracy in training: after each epoch, which a checkpoint keeps, and at the end."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from common.command.cli import UserError, log
from common.files.unfinished import SCRIPT
from common.files.untrusted import read_untrusted
from common.images.data import ImageSet, balanced_subset, checksum
from common.measure.evaluate import measure_accuracy, predict
from common.network.checkpoint import save_checkpoint
from common.report.results import percent
from training.loop.fit import EpochSummary
from training.loop.state import TrainingState
from training.recipe import Recipe

CHECKPOINT_NAME = "checkpoint.pt"
HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500


@dataclass(frozen=True)
class EpochRow(EpochSummary):
    """Summary of an epoch, with the accuracy on held-out images after it."""

    held_out_accuracy: float


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
    """Measures on held-out images and saves a checkpoint after every epoch of a run.

    It is the ``after_epoch`` of :func:`training.loop.fit.fit`.
    """

    def __init__(self, held_out: ImageSet, epochs: int, checkpoint: Path):
        self.held_out, self.epochs, self.checkpoint = held_out, epochs, checkpoint
        self.rows: list[EpochRow] = []

    def __call__(self, state: TrainingState, summary: EpochSummary) -> None:
        """Measure after an epoch, and save all epochs so far."""
        accuracy = measure_accuracy(find_correct(state.model.eval(), self.held_out)).value
        row = EpochRow(**asdict(summary), held_out_accuracy=accuracy)
        self.rows.append(row)
        log.info(
            "epoch %*d/%d  loss %.3f  held-out %s  %.1f s",
            len(str(self.epochs)), row.epoch, self.epochs, row.loss, percent(accuracy), row.seconds,
        )  # fmt: skip
        content = {"rows": [asdict(row) for row in self.rows], "tensors": state.tensors()}
        save_checkpoint(content, self.checkpoint)

    def resume(self, state: TrainingState) -> None:
        """Load the checkpoint into ``state``, if there is one.

        Raises:
            UserError: The checkpoint is damaged or of another network; nothing is changed.
        """
        if not self.checkpoint.exists():
            return
        try:
            saved = read_untrusted(self.checkpoint)
            rows = [EpochRow(**row) for row in saved["rows"]]
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
    """Split training images into those to train on and ``count`` class-balanced held-out ones.

    Raises:
        UserError: No image would be left to train on.
    """
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
