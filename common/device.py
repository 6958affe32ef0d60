"""Where work runs: the device and the number of CPU threads."""

from __future__ import annotations

import contextlib
import ctypes

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
    """Use ``count`` CPU threads, or what torch chooses; return how many that is."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; elsewhere nothing changes.

    By default it returns blocks of more than 32 MB to the system at once, which then maps and
    zeroes the same pages again for the next layer. At batch 128 the first layers' FP32 activations
    are that large.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries may number these differently)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
