"""Where work runs: the device and the number of CPU threads."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch

from common.cli import UserError, log


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; ``auto`` takes a GPU where there is one.

    On a GPU, TF32 stays off, so that predictions are those of the CPU up to FP32 rounding.

    Raises:
        UserError: The device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((gpu for gpu, there in available.items() if there), "cpu")
    if not available.get(name, True):
        raise UserError(f"--device {name}: torch finds no such device here")
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        log.info("FP32 work runs on %s", torch.cuda.get_device_name())
    return torch.device(name)


def set_threads(count: int | None) -> int:
    """Use ``count`` CPU threads, or what torch chooses; return how many that is.

    The processes that ``torchrun`` starts on a machine share its cores equally. It would give each
    one thread, by an ``OMP_NUM_THREADS`` of 1; another number is the user's, and holds.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count is None and processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        count = max(1, _usable_cores() // processes)
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: fewer than the machine has, in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; elsewhere nothing changes.

    By default it returns blocks of more than 32 MB to the system at once, which then maps and
    zeroes the same pages again for the next layer. At batch 128 the first layers' FP32 activations
    are that large.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the last on Windows
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries may number these differently)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
