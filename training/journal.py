"""What survives a kill: the checkpoint of the last epoch and the table of all epochs.

Both lie in ``unfinished/`` in the output folder until the run is complete; each is written whole
or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from common.checkpoint import save_checkpoint
from common.cli import UserError
from common.data import Cifar10
from common.output import replace_file
from training.fit import EpochSummary
from training.recipe import Recipe
from training.state import TrainingState

FOLDER_NAME = "unfinished"
CHECKPOINT_NAME = "checkpoint.pt"
EPOCHS_NAME = "epochs.csv"


@dataclass(frozen=True)
class EpochRow(EpochSummary):
    """An epoch, and the held-out accuracy of its weights and of their average."""

    held_out_accuracy: float
    averaged_accuracy: float


def describe_settings(recipe: Recipe, seed: int, train: Cifar10) -> dict:
    """Return all that decides the weights; the images stand for themselves by their SHA-256."""
    digest = hashlib.sha256(train.labels.cpu().numpy().tobytes())
    digest.update(train.images.cpu().contiguous().numpy())
    return {**asdict(recipe), "seed": seed, "training images": digest.hexdigest()}


class Journal:
    """The folder of an unfinished run.

    Args:
        output_dir: The run's output folder.
        settings: All that decides the weights, as plain values; a checkpoint made under others
            cannot be resumed from.
    """

    def __init__(self, output_dir: Path, settings: dict):
        self.folder = output_dir / FOLDER_NAME
        self.settings = settings
        self.rows: list[EpochRow] = []

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's path."""
        return self.folder / CHECKPOINT_NAME

    def start(self, overwrite: bool) -> None:
        """Begin a new run.

        Raises:
            UserError: The folder holds an unfinished run, and ``overwrite`` is false.
        """
        if self.checkpoint.exists() and not overwrite:
            raise UserError(
                f"{self.folder}: holds an unfinished run; continue it with --resume or discard it "
                "with --overwrite"
            )
        self.remove()

    def resume(self, state: TrainingState) -> None:
        """Load the last checkpoint into ``state``.

        Raises:
            UserError: There is none, it is damaged, or it was made under other settings.
        """
        if not self.checkpoint.exists():
            raise UserError(f"{self.checkpoint}: no such file, so there is nothing to resume")
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            settings, rows = saved["settings"], [EpochRow(**row) for row in saved["rows"]]
        except Exception as error:  # torch's reader fails in too many ways to list
            raise UserError(f"{self.checkpoint}: damaged ({error})") from None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{self.checkpoint}: made with {name} = {settings.get(name)}, not {value}; "
                    "a run is resumed with the settings that it was started with"
                )
        state.load_state_dict(saved["state"])
        self.rows = rows

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint and the table of epochs."""
        self.folder.mkdir(exist_ok=True)
        content = {
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "state": state.state_dict(),
        }
        save_checkpoint(content, self.checkpoint)
        write_epochs(self.folder / EPOCHS_NAME, self.rows)

    def remove(self) -> None:
        """Delete the folder: the run is complete, or given up."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_epochs(path: Path, rows: Sequence[EpochRow]) -> None:
    """Write the epochs as CSV, fractions as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(row).items()}
        for row in rows
    )
    replace_file(path, lambda file: file.write(text.getvalue().encode()))
