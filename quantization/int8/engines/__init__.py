"""Engines run an INT8 network; all compute the same integers, up to one rounding."""

from quantization.int8.engines.choice import (
    candidate_engines,
    choose_settings,
    default_engines,
    fastest_by_batch_size,
    fastest_engine,
    require_engine,
    runner,
    saturates,
)
from quantization.int8.engines.fp32 import fp32_runner

__all__ = [
    "candidate_engines",
    "choose_settings",
    "default_engines",
    "fastest_by_batch_size",
    "fastest_engine",
    "fp32_runner",
    "require_engine",
    "runner",
    "saturates",
]
