"""torch's quantized engine, which is one setting of the whole process, shared by threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


def torch_engines() -> list[str]:
    """Return the names of the engines that this torch has on this CPU."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


class EngineSwitch:
    """Sets ``torch.backends.quantized.engine`` while kernels run, and then what it was before.

    Threads that use the same engine run at the same time; one that needs another waits for them.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._engine, self._users, self._before = "", 0, ""

    def acquire(self, engine: str) -> None:
        """Set an engine; until it is released no block of the same thread may need another."""
        with self._changed:
            while self._users and self._engine != engine:
                self._changed.wait()
            if not self._users:
                self._engine, self._before = engine, torch.backends.quantized.engine
                if engine != self._before:
                    torch.backends.quantized.engine = engine
            self._users += 1

    def release(self) -> None:
        """End the use of the engine that was acquired."""
        with self._changed:
            self._users -= 1
            if not self._users:
                if self._engine != self._before:
                    torch.backends.quantized.engine = self._before
                self._changed.notify_all()

    @contextlib.contextmanager
    def using(self, engine: str) -> Iterator[None]:
        """Run a block on an engine."""
        self.acquire(engine)
        try:
            yield
        finally:
            self.release()


SWITCH = EngineSwitch()
using = SWITCH.using
