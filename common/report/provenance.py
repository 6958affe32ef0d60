"""Where a run's results come from: the part of results.json that all scripts share."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from common import __version__
from common.command.cli import REPOSITORY
from common.machine.device import cpu_name, has_vnni
from common.machine.workers import Workers

SCHEMA = 1
PACKAGES = (  # torch's version is among the facts of the machine
    "torchvision", "numpy", "pillow", "safetensors", "constriction", "onnx", "onnxruntime",
    "openvino",
)  # fmt: skip


def common_results(
    script: str, arguments: argparse.Namespace, workers: Workers, inputs: dict
) -> dict:
    """Return the part of results.json that all scripts share, but for what is known at the end.

    Args:
        script: Name of the script, such as ``quantization``.
        arguments: Its arguments, as parsed.
        workers: The processes that shared the run, and where FP32 ran.
        inputs: Result of :meth:`common.inputs.Inputs.describe`, or the like.
    """
    device = workers.device.type
    given = sorted(vars(arguments).items())
    return {
        "schema": SCHEMA,
        "script": script,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in given},
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "vnni": has_vnni(),
            "device": device,
            "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        },
        "made": {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "version": __version__,
            "commit": find_commit(),
            "packages": package_versions(),
        },
        "processes": workers.count,
        **inputs,
    }


def find_commit() -> str | None:
    """Return the commit of this project, with ``-dirty`` where files differ; None without git."""
    if not (REPOSITORY / ".git").exists():
        return None
    command = ["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=12"], capture_output=True, text=True, timeout=10, check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, where they are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
