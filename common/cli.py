"""What every script's command line shares: flags, messages, user errors and exit codes.

Nothing here imports torch, so that ``--help`` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OVER_BUDGET = 3
EXIT_INTERRUPTED = 130

MAX_THREADS = 1024  # far more of them crash the OpenMP runtime
MAX_BATCH_SIZE = 4096  # peaks at 6 GB; far more, and the system kills the run

Item = TypeVar("Item")
log = logging.getLogger("compression")


class UserError(Exception):
    """A failure that the user can mend, told in one line: no traceback, exit code 1."""


# --- validating argument types -------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if (value := _integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    if (value := _integer(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return value


def seed_int(text: str) -> int:
    """Parse a seed: an integer that numpy and torch both take (0 to 2^32 - 1)."""
    if (value := non_negative_int(text)) > 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is larger than 2^32 - 1")
    return value


def thread_count(text: str) -> int:
    """Parse a number of CPU threads."""
    if (value := positive_int(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_THREADS} threads")
    return value


def batch_size(text: str) -> int:
    """Parse a number of images in a batch."""
    if (value := positive_int(text)) > MAX_BATCH_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_BATCH_SIZE} images")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value


def image_count(text: str) -> int | None:
    """Parse a number of images, or ``all`` (returned as None)."""
    if text == "all":
        return None
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive integer nor 'all'"
        ) from None


def path(text: str) -> Path:
    """Parse a path; empty text, as of an unset shell variable, is not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def name(text: str) -> str:
    """Parse a name, for use within ``list_of``."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Make a type for one of some names, for use within ``list_of``."""

    def parse_choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse_choice


def list_of(parse: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """Make a type for comma-separated values, each parsed by ``parse``; repeats are dropped."""

    def parse_list(text: str) -> list[Item]:
        return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_list


def _integer(text: str) -> int:
    # Plain ASCII digits only: int() would also take "1_000", " 7 " and other scripts' digits.
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)


# --- shared flags --------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults where there are any, and keep the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action.default, list):  # as it would be typed
            action = copy.copy(action)
            action.default = ",".join(map(str, action.default))
        return super()._expand_help(action)


def add_shared_arguments(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    """Add the flags of the scripts that compress a checkpoint.

    Args:
        parser: Changed in place.
        output_dir: The script's default for ``--output-dir``.
    """
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help="checkpoint; by default resnet18_cifar10.pth in the working directory, beside the "
        "script or in the repository root, else the bundled weights",
    )
    add_image_arguments(inputs, test_images=2000)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=batch_size, metavar="N", default=64, help="images evaluated at once"
    )
    add_machine_arguments(running)
    outputs = parser.add_argument_group("outputs")
    add_output_arguments(outputs, output_dir)
    outputs.add_argument(
        "--report",
        action="store_true",
        help="write report.html too: the run on one page, plots and all in a single file",
    )


def add_image_arguments(inputs: argparse._ArgumentGroup, test_images: int | None) -> None:
    """Add the flags that say where images come from; ``test_images`` is the default, None all."""
    inputs.add_argument(
        "--data-dir",
        type=path,
        metavar="DIR",
        default=REPOSITORY / "data",
        help="folder with cifar-10-batches-py/ (downloaded there when missing) or with image "
        "folders train/<class>/* and test/<class>/*",
    )
    fallback = inputs.add_mutually_exclusive_group()
    fallback.add_argument(
        "--bundled", action="store_true", help="use the bundled images; touch no network"
    )
    fallback.add_argument(
        "--no-bundled",
        action="store_true",
        help="fail when CIFAR-10 cannot be had, rather than use the bundled images",
    )
    inputs.add_argument(
        "--test-images",
        type=image_count,
        metavar="N|all",
        default=test_images or "all",
        help="test images to measure accuracy on: a class-balanced, seeded subset, or all",
    )


def add_machine_arguments(running: argparse._ArgumentGroup) -> None:
    """Add the flags that say where a script runs."""
    running.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where FP32 work runs; auto takes a GPU where there is one",
    )
    running.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads; by default what torch chooses, one a physical core",
    )
    running.add_argument(
        "--seed", type=seed_int, metavar="N", default=0, help="of every random choice"
    )


def add_output_arguments(outputs: argparse._ArgumentGroup, output_dir: Path) -> None:
    """Add the flags that say where results go; ``output_dir`` is the script's default."""
    outputs.add_argument(
        "--output-dir", type=path, metavar="DIR", default=output_dir, help="where results go"
    )
    outputs.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of an earlier run; by default they are moved to earlier/",
    )
    outputs.add_argument(
        "--json", action="store_true", help="print results.json to stdout, and nothing else"
    )
    outputs.add_argument("--quiet", action="store_true", help="no progress and no notes")


# --- messages: all of them on stderr -------------------------------------------------------------


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def set_up_messages(quiet: bool) -> None:
    """Send notes and warnings to stderr, below any progress bar; ``quiet`` keeps warnings only."""
    log.handlers[:] = [_StderrHandler()]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def progress(
    items: Iterable[Item], description: str, total: int | None = None, unit: str = "batch"
) -> tqdm:
    """Wrap ``items`` in a progress bar with the time left; silent under ``--quiet``.

    Where stderr is no terminal the bar is refreshed seldom, so that logs stay readable.
    """
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        file=sys.stderr,
        leave=False,
        delay=1.0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 15.0,
        disable=not log.isEnabledFor(logging.INFO),
    )


# --- exit codes ----------------------------------------------------------------------------------


def exit_codes(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a script's ``main(argv) -> int`` so that it keeps the exit-code contract.

    0 done, 1 an expected failure (``error: …`` in one line), 2 wrong usage (argparse),
    3 a budget that could not be met, 130 interrupted by Ctrl-C or SIGTERM. Any other exception is
    a bug and keeps its traceback. stdout is flushed here, while a closed pipe or a full disk can
    still be told.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        _make_printing_safe()
        with _interruptions() as interrupted:
            try:
                code = main(argv)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code
            except KeyboardInterrupt:
                return _stop()
            except Exception as error:
                if interrupted:  # which a library has turned into another error
                    return _stop()
                if isinstance(error, BrokenPipeError):  # `| head`: nobody is left to be told
                    return EXIT_FAILED
                if (message := _message(error)) is None:
                    raise
                return _fail(message)
            finally:
                _release_stdout()

    return guarded


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Let SIGTERM do what Ctrl-C does; yields the signals that have come so far."""
    interrupted = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals to handle
        previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
            previous[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _message(error: Exception) -> str | None:
    """Return what to tell the user of an expected failure; None of a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    if _is_out_of_memory(error):
        return "out of memory; a smaller --batch-size needs less"
    return None


def _stop() -> int:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _fail(message: str) -> int:
    # File and tensor names come from outside: no line breaks, no escape sequences.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    return EXIT_FAILED


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError: of a class of its own on a GPU, of its allocator on a CPU.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _make_printing_safe() -> None:
    """Let neither a narrow encoding (``×`` in Latin-9) nor a closed stderr end a run."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _release_stdout() -> None:
    """Flush stdout, or drop what cannot be written, which would fail again when Python ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
