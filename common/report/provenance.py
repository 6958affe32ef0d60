"""What made a run's results: when, by which version of this project, with which packages."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess

from common import __version__
from common.command.cli import REPOSITORY

PACKAGES = (  # torch's stands among the facts of the machine
    "torchvision", "numpy", "pillow", "safetensors", "constriction", "onnx", "onnxruntime",
    "openvino",
)  # fmt: skip


def describe_provenance() -> dict:
    """Return results.json's ``made``: ``date`` (UTC), ``version``, ``commit``, ``packages``."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": find_commit(),
        "packages": package_versions(),
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
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
