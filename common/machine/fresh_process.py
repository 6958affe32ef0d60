"""A call in a process that knows nothing of this one: proof that files alone are enough."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from common.command import cli
from common.command.cli import UserError

Value = TypeVar("Value")

# multiprocessing would import the script again, and meet the signals that are meant for it.
PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from common.machine.fresh_process import answer
answer()
"""


def call_fresh(function: Callable[..., Value], *arguments: object) -> Value:
    """Return ``function(*arguments)``, called in a new Python process at equal threads.

    The new process belongs to no terminal: Ctrl-C comes to this one, which ends it.

    Args:
        function: Of a module, for it is looked up by name there.
        arguments: As the value that is returned, whatever can be pickled.

    Raises:
        UserError: As the call raised it; or the system ended the process.
        RuntimeError: The call failed otherwise; its traceback is on stderr.
    """
    task = pickle.dumps(sys.path) + pickle.dumps((torch.get_num_threads(), function, arguments))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            answered, _ = process.communicate(task)
        finally:
            process.kill()  # it has ended, or nobody waits for its answer any more
            process.wait()
    if process.returncode < 0:
        raise UserError(
            f"the system ended a process of this run (signal {-process.returncode}); "
            "too little memory?"
        )
    if process.returncode:
        raise RuntimeError("a process of this run failed, as told above")
    value = pickle.loads(answered)
    if isinstance(value, UserError):
        raise value
    return value


def answer() -> None:
    """Do what :func:`call_fresh` asks on stdin; its answer goes where stdout was."""
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # whatever a library prints is no part of the answer
        cli.set_up_messages(quiet=True)
        threads, function, arguments = pickle.load(sys.stdin.buffer)
        torch.set_num_threads(threads)
        try:
            value = function(*arguments)
        except UserError as error:
            value = error
        pickle.dump(value, pipe)
