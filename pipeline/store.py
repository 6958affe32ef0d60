"""Networks that took minutes to make: kept while the run is unfinished, and not made again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.command.cli import UserError
from common.network.checkpoint import load_model, save_checkpoint
from common.network.coded import CodedNetwork, load_coded, save_coded
from common.network.resnet import ResNet18


@dataclass(frozen=True)
class Store:
    """Networks by name, in the ``folder`` of what an unfinished run leaves."""

    folder: Path

    def slim(self, key: str, make: Callable[[], ResNet18]) -> tuple[ResNet18, Path]:
        """Return the FP32 network of this name, made only if it is not there, and its file."""
        path = self.folder / f"{key}.pth"
        with contextlib.suppress(UserError):  # missing, or damaged
            return load_model(path), path
        save_checkpoint(make().state_dict(), path)
        return load_model(path), path

    def coded(self, key: str, make: Callable[[], CodedNetwork]) -> tuple[CodedNetwork, Path]:
        """Return the coded network of this name, made only if it is not there, and its file."""
        path = self.folder / f"{key}.safetensors"
        with contextlib.suppress(UserError):  # missing, or damaged
            return load_coded(path), path
        save_coded(make(), path)
        return load_coded(path), path
