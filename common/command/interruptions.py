"""Ctrl-C, SIGTERM and a closed terminal: all stop a run alike, but not where it must be whole.

A signal that is ignored when a script starts stays ignored: a run under nohup, or behind a shell's
``&``, goes on when its terminal closes. SIGTERM stops it all the same.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

# Each with what Python or the system does about it by default.
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _DEFAULTS[signal.SIGHUP] = signal.SIG_DFL


@contextlib.contextmanager
def as_keyboard_interrupts() -> Iterator[list[int]]:
    """Let every one of the signals do what Ctrl-C does; yields those that have come so far."""
    interrupted = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals to handle
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) == default:
                previous[number] = signal.signal(number, interrupt)
    try:
        yield interrupted
    finally:
        _restore(previous)


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
    """Let ``handler`` have each of the signals that is not ignored."""
    previous = {}
    if threading.current_thread() is threading.main_thread():  # which alone gets signals
        for number in _DEFAULTS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        _restore(previous)


def _restore(handlers: dict[signal.Signals, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
