"""The number format of convolutions and products while training."""

from __future__ import annotations

import torch

AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(device: torch.device) -> str:
    """Return the precision that ``device`` is fast in: ``bf16``, ``fp16`` or ``fp32``."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which convolutions and products run in ``precision``."""
    return torch.autocast(
        device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32"
    )
