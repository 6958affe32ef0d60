"""How every script talks to its user, without torch: messages, progress, errors, exit codes."""

import codecs
import contextlib
import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from common.command import interruptions

PROGRESS_WIDTH = 79
REPOSITORY = Path(__file__).resolve().parents[2]
# Where data/ and results/ lie: in the repository; for an installed copy in the working directory.
WORKSPACE = REPOSITORY if (REPOSITORY / "pyproject.toml").exists() else Path.cwd()

# Turns that a waiting OpenMP thread spins before it sleeps; the default is 300,000. docs/method.md
# shows what that changes on idle cores and on cores that other programs use.
SPIN_COUNT = "30000"

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_OVER_BUDGET, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

# What the scripts print beyond ASCII. Each is one character, so columns stay in line.
LOOK_ALIKES = {"─": "-", "–": "-", "−": "-", "×": "x", "≈": "~", "…": ":", "±": "~", "→": ">"}

Item = TypeVar("Item")
log = logging.getLogger("compression")


class UserError(ValueError):
    """A failure that the user can correct, told in one line: no traceback, exit code 1.

    It is a ValueError, so that callers of ``load_int8`` need no name of this project.
    """


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + visible(record.getMessage()), file=sys.stderr)


def visible(value: object) -> str:
    """Return a value as text that cannot rewrite the terminal; names of files come from outside."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def counted(number: float, noun: str) -> str:
    """Format a number of things: 1 point, 0.5 points, 10,000 images."""
    text = f"{number:,.10g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def set_up_messages(quiet: bool) -> None:
    """Send notes and warnings to stderr, below any progress bar; ``quiet`` keeps warnings only."""
    log.handlers[:] = [_StderrHandler()]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def progress(
    items: Iterable[Item], description: str, total: int | None = None, unit: str = "batch"
) -> tqdm:
    """Wrap ``items`` in a progress bar: none when quiet, seldom refreshed and 80 wide in logs."""
    # In a log a bar that is wiped would leave its line open, and a message would stick to it.
    how = {"ncols": PROGRESS_WIDTH, "mininterval": 15.0, "leave": True}
    if sys.stderr.isatty():
        how = {"dynamic_ncols": True, "leave": False}
    return tqdm(
        items, desc=description, total=total, unit=unit, file=sys.stderr, delay=1.0,
        disable=not log.isEnabledFor(logging.INFO), **how,
    )  # fmt: skip


def start(quiet: bool) -> float:
    """Set up messages and import torch; return the time of the start, of ``perf_counter``."""
    started = time.perf_counter()
    set_up_messages(quiet)
    import_torch()
    return started


def import_torch() -> None:
    """Import torch, which takes seconds; Ctrl-C ends the process within them.

    A KeyboardInterrupt raised during the import would abort, or be taken for a missing NumPy.
    Waiting threads of GNU OpenMP would spin for milliseconds on cores that other work needs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # the user has not decided
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

    def stop(number: int, frame: object) -> None:
        try:
            _stop()
        finally:  # the terminal may be gone, too
            os._exit(EXIT_INTERRUPTED)

    with interruptions.handled_by(stop):
        import torch  # noqa: F401


def exit_codes(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a script's ``main(argv) -> int`` so that it keeps the exit-code contract.

    0 done, 1 an expected failure (``error: …`` in one line), 2 wrong usage (argparse), 3 a budget
    that could not be met, 130 interrupted. Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        _make_printing_safe()
        with interruptions.as_keyboard_interrupts() as interrupted:
            try:
                code = main(argv)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code
            except KeyboardInterrupt:
                return _stop()
            except Exception as error:
                if interrupted:  # a library turned the KeyboardInterrupt into another error
                    return _stop()
                if isinstance(error, BrokenPipeError):  # `| head`: nobody reads the output any more
                    return EXIT_FAILED
                if (message := user_message(error)) is None:
                    raise
                print(f"error: {visible(' '.join(message.split()))}", file=sys.stderr)
                return EXIT_FAILED
            finally:
                _release_stdout()

    return guarded


def user_message(error: Exception) -> str | None:
    """Return the message for an expected failure; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    # torch raises a RuntimeError: a class of its own on a GPU, one by its allocator on a CPU.
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if of_torch or isinstance(error, MemoryError):
        return "out of memory; a smaller --batch-size needs less"
    return None


def _stop() -> int:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _make_printing_safe() -> None:
    """Let neither a narrow encoding (``×`` in ASCII) nor a closed stderr end a run."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    codecs.register_error("look-alikes", _look_alikes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="look-alikes")


def _look_alikes(error: UnicodeEncodeError) -> tuple[str, int]:
    """Write what an encoding lacks as ASCII that looks alike, or else as an escape sequence."""
    pieces = (
        LOOK_ALIKES.get(character, character.encode("ascii", "backslashreplace").decode())
        for character in error.object[error.start : error.end]
    )
    return "".join(pieces), error.end


def _release_stdout() -> None:
    """Flush stdout, or drop what cannot be written, which would fail again when Python ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
