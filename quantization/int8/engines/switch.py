"""torch's quantized engine, which is one setting of the whole process, shared by threads."""

import threading

import torch


def torch_engines() -> list[str]:
    """Return the names of the engines that this torch has on this CPU."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


class UsingEngine:
    """Context in which ``torch.backends.quantized.engine`` is set; then it is what it was before.

    Threads that use the same engine run at the same time; one that needs another waits for them.
    A thread may not enter the context of another engine within it.
    """

    _lock = threading.Lock()  # faster than a condition's own
    _is_free = threading.Condition(_lock)
    _current, _before, _users = "", "", 0

    def __init__(self, engine: str):
        self._engine = engine

    def __enter__(self) -> None:
        switch = UsingEngine
        with switch._lock:
            while switch._users and switch._current != self._engine:
                switch._is_free.wait()
            if not switch._users:
                switch._current, switch._before = self._engine, torch.backends.quantized.engine
                if switch._current != switch._before:
                    torch.backends.quantized.engine = switch._current
            switch._users += 1

    def __exit__(self, *_: object) -> None:
        switch = UsingEngine
        with switch._lock:
            switch._users -= 1
            if not switch._users:
                if switch._current != switch._before:
                    torch.backends.quantized.engine = switch._before
                switch._is_free.notify_all()
