"""The output folder: results appear complete or not at all, and never destroy earlier ones.

A run writes into a hidden staging folder; :meth:`OutputFolder.commit` moves all of it into place.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.command import interruptions
from common.command.cli import UserError, log
from common.files.atomic import STAGING_PREFIX
from common.files.unfinished import PartialResults

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart there
    fcntl = None

EARLIER_NAME = "earlier"
UNFINISHED_NAME = "unfinished"
RESULTS_NAME = "results.json"
# Every results.json of this project has these: docs/results.schema.json requires them.
OUR_ENTRIES = {
    "schema", "script", "arguments", "environment", "data", "weights", "wall_seconds", "artifacts",
}  # fmt: skip
MIN_FREE_BYTES = 256 << 20


class OutputFolder:
    """A folder for one run's results, created when missing; use as a context manager.

    Entering checks, before any long work, that the folder can be written, has room, is used by no
    other run, and that earlier results can be moved to ``earlier/``, or deleted with ``overwrite``;
    other files with a result's name are always moved. Leaving without :meth:`commit` removes all
    that the run wrote.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self._overwrite = path, overwrite
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        self._lock: int | None = None
        self._unfinished: PartialResults | None = None

    def __enter__(self) -> "OutputFolder":
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: not a folder")
        self._created = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self._open()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with interruptions.deferred():
            if self._staging is not None:
                self._staging.cleanup()
            if self._unfinished is not None:
                self._unfinished.leave()
            for folder in self._created:  # empty ones go: the run failed
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if self._lock is not None:
                os.close(self._lock)

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.path).free
        if free_bytes < MIN_FREE_BYTES:
            free, needed = (f"{size / 1e6:.0f} MB" for size in (free_bytes, MIN_FREE_BYTES))
            raise UserError(f"{self.path}: only {free} free; {needed} are needed")
        archive = self.path / EARLIER_NAME
        if archive.exists() and not (
            archive.is_dir()
            and os.access(archive, os.W_OK | os.X_OK)
            and archive.stat().st_dev == self.path.stat().st_dev  # moved in one step, or not at all
        ):
            raise UserError(f"{archive}: in the way: earlier results could not be moved there")
        self._take_lock()
        if self._lock is not None:
            for leftover in self.path.glob(f"{STAGING_PREFIX}*"):  # a run was killed
                shutil.rmtree(leftover, ignore_errors=True)
        with interruptions.deferred():  # it removes itself if __exit__ is never reached
            self._staging = tempfile.TemporaryDirectory(
                prefix=STAGING_PREFIX, dir=self.path, ignore_cleanup_errors=True
            )

    def file(self, name: str) -> Path:
        """Return the path to write ``name`` to; :meth:`commit` moves it into place."""
        return Path(self._staging.name, name)

    def names(self, suffix: str) -> list[str]:
        """Return the names of the files written so far that end in ``suffix``."""
        return sorted(path.name for path in Path(self._staging.name).glob(f"*{suffix}"))

    def keep_unfinished(self, identity: Mapping[str, object], resume: bool) -> PartialResults:
        """Return partial results, which outlive a run that fails; see :class:`PartialResults`."""
        folder = self.path / UNFINISHED_NAME
        with interruptions.deferred():
            self._unfinished = PartialResults(folder, identity, resume, self._overwrite)
        return self._unfinished

    def commit(self) -> None:
        """Move everything into place, or nothing; Ctrl-C and SIGTERM wait until all is done.

        results.json goes last: where it lies, the run's other files lie.
        """
        interruptions.raise_swallowed()
        names = _results_last(os.listdir(self._staging.name))
        with interruptions.deferred(), contextlib.ExitStack() as undo:
            trash = Path(tempfile.mkdtemp(dir=self._staging.name))  # is removed when the run ends
            self._clear_away(names, trash, undo)
            for name in names:
                _move(self.file(name), self.path / name, undo)
            if self._unfinished is not None and self._unfinished.folder.exists():
                # Last: until then, a killed run can be resumed.
                _move(self._unfinished.folder, trash / UNFINISHED_NAME, undo)
            undo.pop_all()
            self._unfinished = None

    def _clear_away(self, names: list[str], trash: Path, undo: contextlib.ExitStack) -> None:
        """Move an earlier run's files, and all files with one of ``names``, out of the way."""
        earlier = {name for name in _artifacts(self.path) if (self.path / name).is_file()}
        in_the_way = earlier | {name for name in names if os.path.lexists(self.path / name)}
        archive = None
        # results.json first: it must not describe an incomplete folder.
        for path in (self.path / name for name in reversed(_results_last(in_the_way))):
            if self._overwrite and path.name in earlier:
                _move(path, trash / path.name, undo)
            else:
                archive = archive or self._new_archive(path.lstat().st_mtime, undo)
                _move(path, archive / path.name, undo)
        if archive:
            log.info("earlier results moved to %s (--overwrite deletes them instead)", archive)

    def _new_archive(self, written: float, undo: contextlib.ExitStack) -> Path:
        """Make a folder in ``earlier/``, named by when results were ``written`` (seconds)."""
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(written))
        archives = self.path / EARLIER_NAME
        archives.mkdir(exist_ok=True)
        names = itertools.chain([stamp], (f"{stamp}_{number}" for number in itertools.count(1)))
        archive = next(archives / name for name in names if not os.path.lexists(archives / name))
        archive.mkdir()
        undo.callback(archive.rmdir)
        return archive

    def _take_lock(self) -> None:
        """Lock the folder itself; the lock ends with the process."""
        if fcntl is None:
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{self.path}: in use by another run; choose another folder") from None
        except OSError as error:  # NFS locks no folders
            os.close(handle)
            log.warning("%s: cannot be locked (%s); start no second run", self.path, error.strerror)
        else:
            self._lock = handle


def _move(source: Path, target: Path, undo: contextlib.ExitStack) -> None:
    source.rename(target)
    undo.callback(target.rename, source)


def _artifacts(folder: Path) -> set[str]:
    """Return the names of an earlier run's files: results.json, and those that it lists.

    The set is empty if results.json is missing or was not written by this project.
    """
    try:
        results = json.loads((folder / RESULTS_NAME).read_bytes())
        if not (results.keys() >= OUR_ENTRIES and isinstance(results["schema"], int)):
            return set()
        listed = results["artifacts"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
    names = [name for value in listed for name in (value if isinstance(value, list) else [value])]
    return {RESULTS_NAME, *(n for n in names if isinstance(n, str) and Path(n).name == n)}


def _results_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == RESULTS_NAME, name))
