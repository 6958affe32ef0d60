"""The scan's journal: what is finished survives a kill, and is used only by the same scan.

One JSON object a line. The first line says what is scanned (weights, images, settings, by
checksum); each further line is one finished piece of work, on the disk before the next begins. A
line cut off by a kill is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from common.cli import log


class Journal:
    """Finished work by key, in a file that grows line by line.

    Args:
        path: Of the file; created when missing.
        identity: What makes results comparable; JSON values. A journal with another identity is
            discarded, and the difference is named.
        resume: Use what the file holds; otherwise it is discarded.
    """

    def __init__(self, path: Path, identity: dict, resume: bool):
        self._path = path
        self._finished: dict[str, dict] = {}
        lines, changed = self._read(), []
        if lines and not resume:
            log.info("an unfinished scan is discarded; --resume would have continued it")
        elif lines and (changed := _differences(lines[0], identity)):
            log.warning("cannot resume: %s changed; the scan starts afresh", " and ".join(changed))
        elif lines:
            self._finished = {line["key"]: line["value"] for line in lines[1:]}
        if self._finished:
            log.info("resuming: what is finished is not done again")
        elif resume and not (lines and changed):
            log.info("nothing finished to resume; the scan starts afresh")
        self._rewrite(identity)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._file.close()
        if kind is not None and self._finished:
            log.info("what the scan finished is kept: --resume continues from there")

    def __contains__(self, key: str) -> bool:
        return key in self._finished

    def __len__(self) -> int:
        return len(self._finished)

    def __getitem__(self, key: str) -> dict:
        return self._finished[key]

    def __setitem__(self, key: str, value: dict) -> None:
        """Record finished work; it is on the disk when this returns."""
        self._finished[key] = value
        self._append({"key": key, "value": value})

    def delete(self) -> None:
        """Remove the file, once the results that it led to are in place."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[dict]:
        lines = []
        if self._path.exists():
            for line in self._path.read_bytes().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # cut off by a kill, and so the last one
                    break
        return lines

    def _rewrite(self, identity: dict) -> None:
        """Begin a clean file; what is there stays there until the new one is whole."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        self._file = temporary.open("w", encoding="utf-8")
        self._append(identity)
        for key, value in self._finished.items():
            self._append({"key": key, "value": value})
        temporary.replace(self._path)

    def _append(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self._file.fileno())


def _differences(found: dict, identity: dict) -> list[str]:
    names = [*identity, *(name for name in found if name not in identity)]
    return [name for name in names if found.get(name) != identity.get(name)]
