"""A function call in a new process, which knows nothing but the files."""

import contextlib
import os
import pickle
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from common.command import cli
from common.machine.device import count_memory_of_other, peak_memory_bytes, set_up_cpu

Value = TypeVar("Value")

# multiprocessing would import the script again, and meet the signals that are meant for it.
PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from common.machine.fresh_process import answer
answer()
"""


@contextlib.contextmanager
def start_fresh(
    function: Callable[..., Value], *arguments: object
) -> Iterator[Callable[[], Value]]:
    """Call ``function(*arguments)`` in a new Python process at equal threads.

    The new process ends when this one does (on Windows not if this one is killed). The function is
    one of a module; arguments and value can be pickled.

    Yield a function that waits for the value. It raises a UserError if the user can correct the
    failure or the system ended the process, else a RuntimeError; the traceback is on stderr.
    """
    with tempfile.TemporaryFile() as task:  # a pipe is too small: writing to it would block
        pickle.dump(sys.path, task)
        pickle.dump((torch.get_num_threads(), function, arguments), task)
        task.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=task, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    with process:
        try:
            yield lambda: _answer_of(process)
        finally:
            process.kill()  # it has ended, or its answer is no longer needed
            process.wait()  # after Ctrl-C, Popen itself would wait for a quarter of a second only


def _answer_of(process: subprocess.Popen) -> object:
    answered, _ = process.communicate()
    if process.returncode < 0:
        signal = -process.returncode
        raise cli.UserError(f"the system ended a process of this run (signal {signal}); too little "
                        "memory?")  # fmt: skip
    if process.returncode:
        raise RuntimeError("a process of this run failed, as told above")
    value, peak_bytes = pickle.loads(answered)
    count_memory_of_other(peak_bytes)
    if isinstance(value, cli.UserError):
        raise value
    return value


def answer() -> None:
    """Run the call that :func:`start_fresh` sends on stdin; the answer goes to stdout."""
    with os.fdopen(os.dup(1), "wb") as pipe:
        if hasattr(select, "poll"):
            threading.Thread(target=_end_with_reader, args=[pipe.fileno()], daemon=True).start()
        os.dup2(2, 1)  # what libraries print goes to stderr
        cli.set_up_messages(quiet=True)
        threads, function, arguments = pickle.load(sys.stdin.buffer)
        set_up_cpu(threads)
        try:
            value = function(*arguments)
        except Exception as error:
            if (message := cli.user_message(error)) is None:
                raise
            value = cli.UserError(message)
        pickle.dump((value, peak_memory_bytes()), pipe)
    sys.stdout.flush()
    os._exit(cli.EXIT_DONE)  # the end of torch's libraries takes 100 MB more than is counted


def _end_with_reader(pipe: int) -> None:
    """End this process once the other end of its pipe is closed: the process that asked died."""
    watched = select.poll()
    watched.register(pipe, 0)  # errors are reported all the same
    watched.poll()
    os._exit(cli.EXIT_FAILED)
