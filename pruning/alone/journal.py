"""The scan's journal: what is finished survives a kill, and is used only by the same scan.

A CRC-32 and a JSON object a line. The first line says what is scanned (weights, images, settings,
by checksum); each further line is one finished piece of work, on the disk before the next begins.
A line that was cut off by a kill, or damaged, is dropped with all that follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import UserDict
from pathlib import Path

from common.command.cli import log
from common.files.output import replace_file
from common.files.resuming import refuse_to_discard, require_same_settings


class Journal(UserDict[str, dict]):
    """Finished work by key, in a file that grows line by line.

    Args:
        path: Of the file; created when missing.
        identity: What makes results comparable; JSON values.
        resume: Use what the file holds.
        overwrite: Discard it otherwise.

    Raises:
        UserError: The file holds finished work that neither flag asks for, or of another identity.
    """

    def __init__(self, path: Path, identity: dict, resume: bool, overwrite: bool = False):
        super().__init__()
        self._path = path
        head, *finished = self._read() or [identity]
        if finished and resume:
            require_same_settings(path, head, identity)
            self.data = {line["key"]: line["value"] for line in finished}
            log.info("resuming: what is finished is not done again")
        elif finished and not overwrite:
            refuse_to_discard(path)
        elif resume:
            log.info("nothing finished to resume; the scan starts afresh")
        self._rewrite(identity)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._file.close()
        if kind is not None and self.data:
            log.info("what the scan finished is kept: --resume continues from there")
        elif kind is not None:
            self._path.unlink()

    def __setitem__(self, key: str, value: dict) -> None:
        """Record finished work; it is on the disk when this returns."""
        super().__setitem__(key, value)
        self._append({"key": key, "value": value})

    def _read(self) -> list[dict]:
        lines = []
        if self._path.exists():
            for line in self._path.read_bytes().splitlines():
                crc, _, text = line.partition(b" ")
                if crc != _crc(text):
                    break
                lines.append(json.loads(text))
        return lines

    def _rewrite(self, identity: dict) -> None:
        """Begin a clean file; what is there stays there until the new one is whole."""
        lines = [identity, *({"key": key, "value": value} for key, value in self.data.items())]
        replace_file(self._path, lambda file: file.writelines(map(_line, lines)))
        self._file = self._path.open("ab")  # only now: Windows replaces no open file

    def _append(self, line: dict) -> None:
        self._file.write(_line(line))
        self._file.flush()
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self._file.fileno())


def _line(value: dict) -> bytes:
    text = json.dumps(value).encode()
    return _crc(text) + b" " + text + b"\n"


def _crc(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
