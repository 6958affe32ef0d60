"""Where work runs: the device and the number of CPU threads."""

from __future__ import annotations

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
