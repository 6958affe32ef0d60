"""What a run has finished while it is not: used by the same run alone, and never lost.

It lies in a folder of its own within the output folder: a file for each finished piece of work,
whole or not there at all, and one that says what makes the pieces those of this run.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path

from common.command.cli import UserError, log
from common.files.atomic import replace_file

IDENTITY = "identity"
SUFFIX = ".json"


class Unfinished(UserDict[str, object]):
    """Finished pieces of work: JSON values by key, and beside them files of other kinds.

    A value that is set is on the disk at once. One that was damaged there counts as not finished.

    Args:
        folder: Created when missing.
        identity: What makes the pieces those of one run; JSON values, named for the user.
        resume: Use what the folder holds.
        overwrite: Discard it otherwise.

    Raises:
        UserError: The folder holds pieces that neither flag asks for, or of another identity.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, object], resume: bool, overwrite: bool = False
    ):
        super().__init__()
        self.folder = folder
        if self._has_pieces() and not self._file_of(IDENTITY).exists():
            raise UserError(f"{folder}: in the way: no run left it")
        if self._has_pieces() and resume:
            self._require(identity)
            values = {path.stem: _read(path) for path in folder.glob(f"[!.]*{SUFFIX}")}
            self.data = {k: v for k, v in values.items() if v is not None and k != IDENTITY}
            log.info("resuming: what is finished is not done again")
        elif self._has_pieces() and not overwrite:
            raise UserError(
                f"{folder}: left by an unfinished run; continue it with --resume or discard it "
                "with --overwrite"
            )
        else:
            if resume:
                log.info("nothing finished to resume: the run starts afresh")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._write(IDENTITY, identity)

    def __setitem__(self, key: str, value: object) -> None:
        """Keep a finished piece; it is on the disk when this returns."""
        self._write(key, value)
        super().__setitem__(key, value)

    def leave(self) -> None:
        """End a run that failed: what it has finished stays."""
        if self._has_pieces():
            log.info("what is finished is kept: --resume continues from there")
        else:
            self.discard()

    def discard(self) -> None:
        """End a run that is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _has_pieces(self) -> bool:
        return any(path.stem != IDENTITY for path in self.folder.glob("[!.]*"))

    def _require(self, identity: Mapping[str, object]) -> None:
        before = _read(self._file_of(IDENTITY))
        if not isinstance(before, dict):
            raise UserError(f"{self.folder}: damaged; start anew with --overwrite")
        names = [n for n in {**identity, **before} if before.get(n) != identity.get(n)]
        if names:
            raise UserError(
                f"{self.folder}: left by a run that differs in {' and '.join(names)}; resume it as "
                "it was started, or discard it with --overwrite"
            )

    def _write(self, key: str, value: object) -> None:
        text = json.dumps(value).encode()
        content = _crc(text) + b" " + text
        replace_file(self._file_of(key), lambda file: file.write(content))

    def _file_of(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def _read(path: Path) -> object:
    """Return the value of a piece; None where it is damaged."""
    crc, _, text = path.read_bytes().partition(b" ")
    return json.loads(text) if text and crc == _crc(text) else None


def _crc(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
