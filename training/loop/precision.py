"""The number format of convolutions and products while training."""

from __future__ import annotations

import torch

from common.machine.device import bf16_pays


def choose_precision(device: torch.device) -> str:
    """Return ``bf16`` where ``device`` is fast in it, else ``fp32``."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and bf16_pays()
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which convolutions and products run in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
