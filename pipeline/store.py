"""Networks that take minutes to make: kept while the run is unfinished, and not made again."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.checkpoints.checkpoint import save_checkpoint
from common.checkpoints.models import with_tensors
from common.command.cli import UserError
from common.files.unfinished import PartialResults
from common.files.untrusted import read_untrusted
from quantization.files.int8_file import SUFFIX, read_int8, save_int8
from quantization.int8.network import Int8Network
from training.loop.fit import choose_precision

PRECISION = "precision"  # name of the partial result: the precision of each device's networks


@dataclass(frozen=True)
class Store:
    """Networks by name, among the partial results of a run."""

    unfinished: PartialResults  # partial results of the run
    model: nn.Module  # dense network that the others are made from

    def precision(self, device: torch.device) -> str:
        """Return the precision to make networks in on a device: ``bf16`` or ``fp32``.

        It is chosen once and kept: a run that is resumed may measure another one to be faster, and
        would mix networks of both. If the record is lost, a UserError is raised.
        """
        recorded = self.unfinished.get(PRECISION, {})
        if not recorded and any(self.unfinished.folder.glob("*.pth")):
            raise UserError(
                f"{self.unfinished.folder}: damaged; start anew with --overwrite instead"
            )
        if device.type not in recorded:
            recorded = recorded | {device.type: choose_precision(device)}
            self.unfinished[PRECISION] = recorded
        return recorded[device.type]

    def slim(self, key: str, make: Callable[[], nn.Module]) -> tuple[nn.Module, Path]:
        """Return the FP32 network of this name, made only if it is not there, and its file."""
        path = self.unfinished.folder / f"{key}.pth"
        with contextlib.suppress(UserError):  # missing, or damaged
            return self.read_slim(path), path
        save_checkpoint(make().state_dict(), path)
        return self.read_slim(path), path

    def read_slim(self, path: Path) -> nn.Module:
        """Read a network made from the dense one, or raise a UserError if it is damaged."""
        try:
            return with_tensors(self.model, read_untrusted(path))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {error}") from None

    def int8(self, key: str, make: Callable[[], Int8Network]) -> tuple[Int8Network, Path]:
        """Return the INT8 network of this name, made only if it is not there, and its file."""
        path = self.unfinished.folder / f"{key}{SUFFIX}"
        with contextlib.suppress(UserError):  # missing, or damaged
            return read_int8(path), path
        save_int8(make(), path)
        return read_int8(path), path
