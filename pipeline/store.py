"""Networks that took minutes to make, kept on the disk while the run is unfinished.

A run that is killed leaves them in its output folder; ``--resume`` reads what is there and makes
only what is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from common.command.cli import UserError, log
from common.files.output import replace_file
from common.files.resuming import refuse_to_discard, require_same_settings
from common.network.checkpoint import load_model, save_checkpoint
from common.network.coded import CodedNetwork, load_coded, save_coded
from common.network.resnet import ResNet18

FOLDER_NAME = "pipeline.unfinished"
IDENTITY_NAME = "identity.json"


class Store:
    """A folder of finished networks, for one run at a time; use as a context manager.

    A run that ends well leaves nothing of it; one that fails leaves it, if any network is finished.

    Args:
        folder: Created when missing.
        identity: What makes its networks those of this run; JSON values, named for the user.
        resume: Use what the folder holds.
        overwrite: Discard it otherwise.

    Raises:
        UserError: The folder holds networks that neither flag asks for, or of another identity.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, object], resume: bool, overwrite: bool = False
    ):
        self.folder = folder
        marker = folder / IDENTITY_NAME
        if self._holds_networks() and resume:
            require_same_settings(folder, _read_identity(marker), identity)
            log.info("resuming: networks that are finished are not made again")
        elif self._holds_networks() and not overwrite:
            refuse_to_discard(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            text = json.dumps(identity).encode()
            replace_file(marker, lambda file: file.write(text))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is not None and self._holds_networks():
            log.info("networks that are finished are kept: --resume continues from there")
        else:
            shutil.rmtree(self.folder)

    def slim(self, key: str, make: Callable[[], ResNet18]) -> tuple[ResNet18, Path]:
        """Return the FP32 network of this name, made only if it is not there, and its file."""
        path = self.folder / f"{key}.pth"
        if not path.exists():
            save_checkpoint(make().state_dict(), path)
        return load_model(path), path

    def coded(self, key: str, make: Callable[[], CodedNetwork]) -> tuple[CodedNetwork, Path]:
        """Return the coded network of this name, made only if it is not there, and its file."""
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            save_coded(make(), path)
        return load_coded(path), path

    def _holds_networks(self) -> bool:
        return any(self.folder.glob("*.pth")) or any(self.folder.glob("*.safetensors"))


def _read_identity(marker: Path) -> dict:
    try:
        identity = json.loads(marker.read_bytes())
        if isinstance(identity, dict):
            return identity
    except ValueError:
        pass
    raise UserError(f"{marker}: damaged; start anew with --overwrite")
