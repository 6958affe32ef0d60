"""Calls in a fresh process: what comes back, and what ends it."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Copy, foreground_signals

from common.command import interruptions
from common.command.cli import UserError
from common.machine import device
from common.machine.fresh_process import start_fresh

# What is called is looked up by name in this module, which the new process imports.


def describe(*arguments: object) -> tuple:
    print("not a part of the answer")
    return os.getpid(), os.getsid(0), torch.get_num_threads(), arguments


def map_new_memory() -> int:
    """Return how many blocks glibc maps anew for 64 MB, rather than take them from its heap."""

    class Info(ctypes.Structure):
        names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
        _fields_ = [(name, ctypes.c_size_t) for name in (*names, "uordblks", "fordblks", "keep")]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    before = libc.mallinfo2().hblks
    kept = torch.empty(64 << 20, dtype=torch.uint8)
    return libc.mallinfo2().hblks - before + 0 * len(kept)


def refuse() -> None:
    raise UserError("a file is damaged")


def fail() -> None:
    raise KeyError("a bug")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_own_number(path: str) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def start_and_wait(argv: list[str]) -> None:
    call_fresh(write_own_number, argv[0])


def is_running(process: int) -> bool:
    """Whether a process has not ended; in a container nobody may clear away what has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def hold_memory() -> int:
    return len(torch.ones(100_000_000))


def write_at_the_end(path: str) -> None:
    atexit.register(Path(path).touch)


def exhaust():
    torch.empty(1 << 60)


def write_number_and_return(path: str, value: bytes) -> bytes:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    return value


def call_fresh(function, *arguments):
    with start_fresh(function, *arguments) as wait:
        return wait()


def test_another_process_of_as_many_threads_and_of_no_terminal(capfd):
    process, session, threads, arguments = call_fresh(describe, "text", 3)
    assert process != os.getpid()
    assert session == process  # a terminal's signals go to the processes of its own
    assert threads == torch.get_num_threads()
    assert arguments == ("text", 3)
    assert capfd.readouterr() == ("", "not a part of the answer\n")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33")
def test_it_keeps_freed_memory_so_that_it_times_fairly():
    assert call_fresh(map_new_memory) == 0


@pytest.mark.parametrize(
    ("function", "error", "told"),
    [
        (refuse, UserError, "a file is damaged"),
        (exhaust, UserError, "out of memory"),
        (die, UserError, "the system ended a process of this run .signal 9.; too little memory"),
        (fail, RuntimeError, "a process of this run failed"),
    ],
)
def test_what_ends_it_is_told(function, error, told):
    with pytest.raises(error, match=told):
        call_fresh(function)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what is held")
def test_its_memory_counts_beside_what_this_one_holds():
    """The total is this process's memory and the other's, which imports torch and holds 400 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    call_fresh(hold_memory)
    assert device.peak_memory_bytes() > pages * resource.getpagesize() + 400e6


def test_it_takes_no_memory_once_it_has_counted_its_own(tmp_path):
    """What libraries take as a process ends would not be in the sum."""
    assert call_fresh(write_at_the_end, str(tmp_path / "ended")) is None
    assert not (tmp_path / "ended").exists()


def test_this_one_goes_on_meanwhile(tmp_path):
    """Neither what is asked nor what is answered fits in a pipe."""
    path, argument = tmp_path / "number", b"x" * 10**6
    with start_fresh(write_number_and_return, str(path), argument) as wait:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.exists()  # it is at work, and nobody has waited for it
        assert wait() == argument


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux who is running")
def test_it_ends_where_this_one_is_killed(tmp_path):
    path = tmp_path / "number"
    with Copy(start_and_wait, path, output=tmp_path / "told") as copy:
        while not (path.exists() and path.read_text()):
            assert copy.wait(0.05) is None
        other = int(path.read_text())
        assert is_running(other)
        copy.send(signal.SIGKILL)
        copy.wait()
    deadline = time.monotonic() + 30
    while is_running(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(other)


def test_it_ends_with_this_one_and_does_not_finish_first(tmp_path):
    """Interrupted as soon as the new process is at work, which would go on for ten minutes."""
    path = tmp_path / "number"

    def interrupt(number: int, frame: object) -> None:
        if path.exists() and path.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with foreground_signals(), interruptions.as_keyboard_interrupts() as came:
            with pytest.raises(KeyboardInterrupt):
                call_fresh(write_own_number, str(path))
            assert came == [signal.SIGINT]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)
