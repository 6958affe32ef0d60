"""The output folder: results appear complete or not at all, and never destroy earlier ones.

A run writes into a hidden staging folder. :meth:`OutputFolder.commit` moves everything into place
at the end; a failed, interrupted or killed run leaves the folder as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common.cli import UserError, log

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart there
    fcntl = None

STAGING_PREFIX = ".partial-"
EARLIER_NAME = "earlier"
RESULTS_NAME = "results.json"
MIN_FREE_BYTES = 256 << 20


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: ``write`` fills a temporary one, then it is renamed.

    Args:
        path: Replaced if it exists.
        write: Called with the binary file.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class OutputFolder:
    """A folder for one run's results; use as a context manager.

    Entering checks, before any long work, that the folder can be written, has room, and is used by
    no other run. Leaving without :meth:`commit` removes all that the run wrote.

    Args:
        path: Created when missing.
        overwrite: Replace an earlier run's files; otherwise they are moved to ``earlier/``.
        keep: Names of files that outlive a run that fails (a journal to resume from).
    """

    def __init__(self, path: Path, overwrite: bool = False, keep: tuple[str, ...] = ()):
        self.path = path
        self._overwrite = overwrite
        self._keep = keep
        self._staging: Path | None = None
        self._lock: int | None = None
        self._created = False

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: not a folder")
        self._created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.path).free
        if free_bytes < MIN_FREE_BYTES:
            raise UserError(
                f"{self.path}: only {free_bytes / 1e6:.0f} MB free; "
                f"{MIN_FREE_BYTES / 1e6:.0f} MB are needed"
            )
        self._take_lock()
        for leftover in self.path.glob(f"{STAGING_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._created:  # and left empty by a run that failed
            with contextlib.suppress(OSError):
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def file(self, name: str) -> Path:
        """Return the path to write ``name`` to; it takes its place at :meth:`commit`."""
        return self._staging / name

    def commit(self) -> None:
        """Move everything that was written into place, results.json last."""
        names = sorted(p.name for p in self._staging.iterdir())
        names.sort(key=lambda name: name == RESULTS_NAME)
        self._set_earlier_aside()
        for name in names:
            (self._staging / name).chmod(0o666 & ~_umask())
            (self._staging / name).replace(self.path / name)

    def _set_earlier_aside(self) -> None:
        results = self.path / RESULTS_NAME
        if self._overwrite or not results.exists():
            return
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(results.stat().st_mtime))
        archive = self.path / EARLIER_NAME
        archive.mkdir(exist_ok=True)
        used = sum(bool(re.fullmatch(rf"{stamp}(_\d+)?", p.name)) for p in archive.iterdir())
        target = archive / (f"{stamp}_{used}" if used else stamp)
        target.mkdir()
        log.info("earlier results moved to %s", target)
        for item in self.path.iterdir():
            if item.is_file() and item.name not in self._keep:
                item.rename(target / item.name)

    def _take_lock(self) -> None:
        """Lock the folder itself; the lock goes with the process, however that ends."""
        if fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self.path}: in use by another run; choose another folder") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
