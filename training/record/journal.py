"""What survives a kill: the checkpoint of the last epoch, with a row for each epoch before it.

It lies in ``unfinished/`` in the output folder until the run is complete, and is written whole or
not at all.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.command.cli import UserError
from common.files.resuming import refuse_to_discard, require_same_settings
from common.files.untrusted import read_sealed, write_sealed
from common.images.data import Cifar10, checksum
from training.loop.fit import EpochSummary
from training.loop.state import TrainingState
from training.recipe import Recipe

FOLDER_NAME = "unfinished"
CHECKPOINT_NAME = "checkpoint.pt"
KIND = "resnet18-cifar10-training"


@dataclass(frozen=True)
class EpochRow(EpochSummary):
    """An epoch, and the accuracy on held-out images after it."""

    held_out_accuracy: float


def describe_settings(recipe: Recipe, seed: int, processes: int, train: Cifar10) -> dict:
    """Return all that decides the weights; the images stand for themselves by their SHA-256."""
    images = checksum((train.labels, train.images))
    return {**asdict(recipe), "seed": seed, "processes": processes, "training images": images}


class Journal:
    """The folder of an unfinished run.

    Args:
        output_dir: The run's output folder.
        settings: All that decides the weights, as plain values; a checkpoint made under others
            cannot be resumed from.
    """

    def __init__(self, output_dir: Path, settings: dict):
        self.folder = output_dir / FOLDER_NAME
        self.checkpoint = self.folder / CHECKPOINT_NAME
        self.settings = settings
        self.rows: list[EpochRow] = []

    def start(self, overwrite: bool) -> None:
        """Begin a new run.

        Raises:
            UserError: The folder holds an unfinished run, and ``overwrite`` is false.
        """
        if self.checkpoint.exists() and not overwrite:
            refuse_to_discard(self.folder)
        self.remove()

    def resume(self, state: TrainingState) -> None:
        """Load the last checkpoint into ``state``.

        Raises:
            UserError: There is none, it is damaged, or it was made under other settings. Nothing is
                changed, the file neither.
        """
        if not self.checkpoint.exists():
            raise UserError(f"{self.checkpoint}: no such file, so there is nothing to resume")
        saved = read_sealed(self.checkpoint, KIND)
        try:
            settings, tensors = dict(saved["settings"]), dict(saved["tensors"])
            rows = [_read_row(row) for row in saved["rows"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{self.checkpoint}: no checkpoint of a training run") from None
        require_same_settings(self.checkpoint, settings, self.settings)
        try:
            if [row.epoch for row in rows] != [*range(1, len(rows) + 1)]:
                raise ValueError("its epochs are out of order")
            state.load(tensors, len(rows))
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{self.checkpoint}: damaged ({error})") from None
        self.rows = rows

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint; there is one row for each of the state's epochs."""
        self.folder.mkdir(exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        content = {"settings": self.settings, "rows": rows, "tensors": state.tensors()}
        write_sealed(content, KIND, self.checkpoint)

    def remove(self) -> None:
        """Delete the folder: the run is complete, or given up."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_row(saved: dict) -> EpochRow:
    row = EpochRow(**saved)
    if not all(math.isfinite(getattr(row, field.name)) for field in fields(row)):
        raise ValueError("not a number")
    return row
