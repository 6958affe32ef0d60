"""Ctrl-C and SIGTERM: both stop a run alike, but not in the middle of what must be whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def as_keyboard_interrupts() -> Iterator[list[int]]:
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


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect after the block, not in it."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    waiting = []
    previous = {
        number: signal.signal(number, lambda number, frame: waiting.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
