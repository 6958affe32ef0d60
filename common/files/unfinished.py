"""Partial results of an interrupted run, in a folder within the output folder."""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path

from common.command.cli import UserError, log
from common.files.atomic import STAGING_PREFIX, replace_file

IDENTITY_NAME = "identity.json"
SCRIPT = "the script"  # entry of an identity: name of the script
COMMAND = "the command"  # entry of the file that is not compared: how the run was started


class PartialResults(UserDict[str, dict]):
    """Partial results of an interrupted run: JSON objects by key, and other files beside them.

    An object that is set is on the disk at once; a damaged one counts as not finished. The
    ``identity`` is what the results depend on: JSON values, by names for the user. ``resume`` uses
    the folder's content, ``overwrite`` alone discards it.

    Raises:
        UserError: Neither flag is given, the identity is another, or no run made the folder.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, object], resume: bool, overwrite: bool = False
    ):
        super().__init__()
        self.folder = folder
        self._require_ours()
        if self._has_pieces() and resume:
            self._require(identity)
            for leftover in filter(Path.is_file, folder.glob(".*")):  # a write was killed
                leftover.unlink()
            values = {path.stem: _read(path) for path in folder.glob("*.json")}
            self.data = {k: v for k, v in values.items() if isinstance(v, dict)}
            del self.data[Path(IDENTITY_NAME).stem]
            log.info("resuming: what is finished is not done again")
        elif self._has_pieces() and not overwrite:
            raise UserError(
                f"{folder}: left by an unfinished run; continue it with --resume or discard it "
                "with --overwrite"
            )
        else:
            if resume:
                log.warning("nothing finished to resume: the run starts afresh")
            self._start(identity)

    def __setitem__(self, key: str, value: dict) -> None:
        _write(self.folder / f"{key}.json", value)
        super().__setitem__(key, value)

    def leave(self) -> None:
        """End a run that failed: its results stay."""
        if self._has_pieces():
            log.info(
                "what is finished is kept: to go on, repeat the command with its flags and --resume"
            )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _require_ours(self) -> None:
        """Check that a run made the folder, or that it does not exist."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_dir() and not self.folder.is_symlink():
            identity = self.folder / IDENTITY_NAME
            if identity.is_file() and re.match(rb"[0-9a-f]{8} ", identity.read_bytes()):
                return
            if all(path.name.startswith(f".{IDENTITY_NAME}") for path in self.folder.iterdir()):
                return  # a run was killed as it began
        raise UserError(f"{self.folder}: in the way: no run left it; move or delete it")

    def _has_pieces(self) -> bool:
        return any(path.name != IDENTITY_NAME for path in self.folder.glob("[!.]*"))

    def _require(self, identity: Mapping[str, object]) -> None:
        before = _read(self.folder / IDENTITY_NAME)
        if not isinstance(before, dict):
            raise UserError(f"{self.folder}: damaged; start anew with --overwrite instead")
        command = before.pop(COMMAND, None)
        names = [n for n in {**identity, **before} if before.get(n) != identity.get(n)]
        if names:
            told = SCRIPT if SCRIPT in names else " and ".join(names)
            raise UserError(
                f"{self.folder}: left by a run that differs in {told}; resume it as it was "
                f"started ({command}), or discard it with --overwrite instead"
            )

    def _start(self, identity: Mapping[str, object]) -> None:
        """Begin with an empty folder; a rename removes old content at once, even if killed."""
        if self.folder.exists():
            trash = tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.folder.parent)
            self.folder.rename(Path(trash, self.folder.name))
            shutil.rmtree(trash, ignore_errors=True)
        self.folder.mkdir()
        try:
            command = {COMMAND: shlex.join(sys.argv)}
            _write(self.folder / IDENTITY_NAME, {**identity, **command})
        except BaseException:
            self.folder.rmdir()
            raise


def _write(path: Path, value: object) -> None:
    text = json.dumps(value).encode()
    replace_file(path, _crc(text) + b" " + text)


def _read(path: Path) -> object:
    """Return the value in a file; None if it is damaged."""
    crc, _, text = path.read_bytes().partition(b" ")
    try:
        return json.loads(text) if crc == _crc(text) else None
    except (ValueError, RecursionError):
        return None


def _crc(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
