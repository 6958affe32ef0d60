"""The machine: its processor, device, CPU threads and memory."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

from common.command.cli import UserError, log

# Memory of this process together with another one, for each process that it started.
_totals_bytes = [0]


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; ``auto`` takes a GPU if there is one.

    TF32 stays off: predictions are the CPU's up to FP32 rounding. A missing device is a UserError.
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


def set_up_cpu(threads: int | None) -> None:
    """Set the number of CPU threads, None for torch's choice, and keep freed memory.

    Processes of ``torchrun`` share a machine's cores equally, unless ``OMP_NUM_THREADS`` is more
    than the 1 that it sets. Every process that evaluates or times calls this: without the kept
    memory FP32 takes a sixth more time at batch 128, which would make INT8 look faster than it is.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is None and processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        threads = max(1, _usable_cores() // processes)
    if threads is not None:
        torch.set_num_threads(threads)
    _keep_freed_memory()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: fewer than the machine has, in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; do nothing elsewhere.

    By default it gives blocks over 32 MB back; FP32 activations at batch 128 are that large.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # constants of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the last on Windows
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries may number these differently)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


@functools.cache
def bf16_pays() -> bool:
    """Return whether convolutions run faster in bf16 than in FP32 on this CPU, timed in 30 ms.

    Instructions for bf16 (AVX-512 BF16, AMX) do not tell: two Zen 5 cores ran it at more than twice
    FP32's rate, two of a Xeon (Emerald Rapids, its AMX hidden by a hypervisor) at half of it.
    """
    flags = torch.cpu.get_capabilities()
    if not (flags.get("avx512_bf16") or flags.get("amx_bf16")):
        return False
    best_seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.inference_mode():
        calls = {dtype: _example_convolution(dtype) for dtype in best_seconds}
        for _ in range(6):  # in turns; the first time warms up
            for dtype, (convolution, maps) in calls.items():
                start = time.perf_counter()
                convolution(maps)
                best_seconds[dtype] = min(best_seconds[dtype], time.perf_counter() - start)
    return best_seconds[torch.bfloat16] < best_seconds[torch.float32]


def _example_convolution(dtype: torch.dtype) -> tuple[torch.nn.Conv2d, torch.Tensor]:
    """Return a convolution of 256 channels, and the maps of 16 images to run it on."""
    layout = {"dtype": dtype, "memory_format": torch.channels_last}
    convolution = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(**layout)
    return convolution, torch.ones(16, 256, 8, 8).to(**layout)


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    named = re.search(r"^model name[^:]*:(.*)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def has_vnni() -> bool:
    """Return whether the CPU multiplies INT8 with 32-bit sums (AVX-512 VNNI, Arm dot product)."""
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_vnni") or flags.get("neon_dot") or flags.get("dot"))


def peak_memory_bytes() -> int | None:
    """Return the most main memory that the run has held at once, in bytes; None if unknown.

    This is the peak of this process or, if larger, the total of this process and one that it
    started, see :func:`count_memory_of_other`. Pages that both share count twice.
    """
    own = _own_peak_bytes()
    return own and max(own, *_totals_bytes)


def count_memory_of_other(peak_bytes: int | None) -> None:
    """Count the peak of another process of the run, which ends now, and what this one holds.

    This one gives no memory back (see :func:`set_up_cpu`), so it held no more at the other's peak.
    """
    held_bytes = _status_bytes("VmRSS") or _own_peak_bytes()
    if peak_bytes is not None and held_bytes is not None:
        _totals_bytes.append(held_bytes + peak_bytes)


def _status_bytes(entry: str) -> int | None:
    """Return an entry of this process's status on Linux; some sandboxes lack it."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(rf"^{entry}:\s+(\d+) kB", status, re.MULTILINE):
            return 1024 * int(found[1])
    return None


def _own_peak_bytes() -> int | None:
    # getrusage would count what the process was before it became Python.
    if peak_bytes := _status_bytes("VmHWM"):
        return peak_bytes
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
