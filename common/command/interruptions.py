"""Ctrl-C, SIGTERM and a closed terminal: all stop a run, but not within what must be whole.

A signal that is ignored when a script starts, as under nohup, stays ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    _SIGNALS.append(signal.SIGHUP)
_received: list[int] = []  # signals that came since the current run began


@contextlib.contextmanager
def as_keyboard_interrupts() -> Iterator[list[int]]:
    """Let each of the signals do what Ctrl-C does; yields the signals received so far."""
    global _received
    _received = received = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        with handled_by(interrupt):
            yield received
    finally:
        _received = []


def raise_swallowed() -> None:
    """Raise KeyboardInterrupt again if a library swallowed it, as callbacks of C code do."""
    if _received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the signals take effect after the block, not in it."""
    waiting = []
    try:
        with handled_by(lambda number, frame: waiting.append(number)):
            yield
    finally:
        for number in waiting:
            signal.raise_signal(number)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Let ``handler`` handle each of the signals that is not ignored."""
    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():  # only this thread gets signals
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by C code
                    undo.callback(signal.signal, number, signal.signal(number, handler))
        yield
