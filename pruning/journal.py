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

from common.cli import log


class Journal(UserDict[str, dict]):
    """Finished work by key, in a file that grows line by line.

    Args:
        path: Of the file; created when missing.
        identity: What makes results comparable; JSON values. A journal with another identity is
            discarded, and the difference is named.
        resume: Use what the file holds; otherwise it is discarded.
    """

    def __init__(self, path: Path, identity: dict, resume: bool):
        super().__init__()
        self._path = path
        lines, changed = self._read(), []
        if lines and not resume:
            log.info("an unfinished scan is discarded; --resume would have continued it")
        elif lines and (changed := _differences(lines[0], identity)):
            log.warning("cannot resume: %s changed; the scan starts afresh", " and ".join(changed))
        elif lines:
            self.data = {line["key"]: line["value"] for line in lines[1:]}
        if self.data:
            log.info("resuming: what is finished is not done again")
        elif resume and not (lines and changed):
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
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            self._file = temporary.open("wb")
            self._append(identity)
            for key, value in self.data.items():
                self._append({"key": key, "value": value})
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _append(self, line: dict) -> None:
        text = json.dumps(line).encode()
        self._file.write(_crc(text) + b" " + text + b"\n")
        self._file.flush()
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self._file.fileno())


def _crc(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _differences(found: dict, identity: dict) -> list[str]:
    names = [*identity, *(name for name in found if name not in identity)]
    return [name for name in names if found.get(name) != identity.get(name)]
