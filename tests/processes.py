"""Run the scripts: in this process, in a copy of it, or as a user starts them.

Importing torch takes seconds, so only what is about a fresh process starts one. A copy has all
imported, and is as much a process as any: it can be killed, and meets others as torchrun's do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from tqdm import tqdm

from common.command import cli

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 600  # for what hangs
# What a shell's foreground job finds; in the background, or under nohup, some are ignored.
DISPOSITIONS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}

# What calls functions in fresh processes, with the files that were written.
READING_BACK = ("quantization.files.artifact", "pipeline.steps")

Finished = subprocess.CompletedProcess[str]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave this process as it was: folder, log, threads, and torch's INT8 engine."""
    folder, threads = os.getcwd(), torch.get_num_threads()
    engine = torch.backends.quantized.engine
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        torch.backends.quantized.engine = engine
        cli.log.handlers.clear()
        cli.log.setLevel(logging.NOTSET)
        cli.log.propagate = True


@contextlib.contextmanager
def foreground_signals() -> Iterator[None]:
    """Let signals do to this process, and to those it starts, what they do in the foreground."""
    before = {number: signal.signal(number, does) for number, does in DISPOSITIONS.items()}
    try:
        yield
    finally:
        for number, does in before.items():
            signal.signal(number, does)


def run_here(
    main: Callable[[list[str]], int],
    *arguments: object,
    folder: Path = REPOSITORY,
    reads_back_here: bool = True,
) -> Finished:
    """Run a script's ``main`` in this process, in ``folder``; a wrong usage is its exit code.

    What it would read back in a fresh process it reads here, unless told otherwise: starting one
    takes seconds. Figures are made but not drawn, which would take half of a small run.
    """
    command = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch("common.report.figures.save_figure", _save_blank))
        for module in READING_BACK if reads_back_here else ():
            stack.enter_context(mock.patch(f"{module}.start_fresh", _start_here))
        os.chdir(folder)
        try:
            code = main(command)
        except SystemExit as stopped:
            code = stopped.code
    return Finished(command, code, out.getvalue(), err.getvalue())


def _save_blank(figure: object, path: Path, timed: object = ()) -> None:
    Image.new("RGB", (8, 8)).save(path)


@contextlib.contextmanager
def _start_here(function: Callable, *arguments: object) -> Iterator[Callable[[], object]]:
    yield lambda: _call_here(function, *arguments)


def _call_here(function: Callable, *arguments: object) -> object:
    engine = torch.backends.quantized.engine
    try:
        return function(*pickle.loads(pickle.dumps(arguments)))
    finally:
        torch.backends.quantized.engine = engine


def run_fresh(*command: object, folder: Path = REPOSITORY, **environment: str) -> Finished:
    """Run Python with ``command`` as a user does."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", *map(str, command)],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        timeout=DEADLINE_SECONDS,
    )  # fmt: skip


class Copy:
    """A copy of this process that runs a script's ``main``.

    Args:
        main: Called with the ``arguments``, as text; its exit code is the process's.
        arguments: Of the script.
        output: The copy writes to this path with ``.out`` and ``.err`` at its end.
        environment: Set in the copy alone.
    """

    def __init__(
        self, main: Callable, *arguments: object, output: Path, **environment: str
    ) -> None:
        self.output = output
        self._process = multiprocessing.get_context("fork").Process(
            target=_run_as_script, args=(main, [*map(str, arguments)], output, environment)
        )
        with warnings.catch_warnings():
            # Of Python 3.12 on: other threads (xdist's) might hold a lock that the copy needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()

    def is_running(self) -> bool:
        """Whether the copy has not ended yet."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> Finished | None:
        """Return how the copy ended; None where it has not after so many ``seconds``."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            return None
        out, err = (self.output.with_suffix(s).read_text() for s in (".out", ".err"))
        return Finished([], self._process.exitcode, out, err)


def _run_as_script(main: Callable, arguments: list[str], output: Path, environment: dict) -> None:
    for number, does in DISPOSITIONS.items():
        signal.signal(number, does)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = output.with_suffix(f".{name}").open("w", buffering=1)
        os.dup2(file.fileno(), number)  # for what C prints
        setattr(sys, f"std{name}", file)
    tqdm.set_lock(threading.RLock())  # its own: a copy that is killed may hold what is shared
    sys.exit(main(arguments))


def start_together(main: Callable, *arguments: object, output: Path) -> list[Copy]:
    """Start two copies that find each other as torchrun's processes do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    if sys.platform == "linux":  # or gloo asks who this host is, which a container may not know
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        Copy(main, *arguments, output=output.with_name(f"{output.name}-{rank}"),
             MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]  # fmt: skip


def run_together(main: Callable, *arguments: object, output: Path) -> list[Finished]:
    """Run two such copies to their ends; both are stopped where one hangs."""
    with contextlib.ExitStack() as stack:
        copies = [*map(stack.enter_context, start_together(main, *arguments, output=output))]
        ended = [copy.wait() for copy in copies]
    assert None not in ended, "a process hangs"
    return ended
