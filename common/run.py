"""A run from its start to its end: processes that share it, and results that say what made them."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common import __version__
from common.command.cli import REPOSITORY
from common.files.atomic import replace_file
from common.files.output import RESULTS_NAME, OutputFolder
from common.machine import device as machine
from common.machine.workers import Workers, join_workers
from common.report.page import write_page
from common.report.results import to_json
from common.report.story import Story

SCHEMA = 1
PACKAGES = (  # torch's version is among the facts of the machine
    "torchvision", "numpy", "pillow", "safetensors", "constriction", "onnx", "onnxruntime",
    "openvino",
)  # fmt: skip
ARTIFACTS = {  # entries of results.json's ``artifacts``, and how the names of their files end
    "models": (".safetensors", ".pth", ".onnx"), "checks": (".check",), "csv": (".csv",),
    "plots": (".png",),
}  # fmt: skip


@contextlib.contextmanager
def start_run(
    args: argparse.Namespace, shared: bool = False
) -> Iterator[tuple[Workers, OutputFolder | None]]:
    """Set up the machine, join the processes that share the run, and open the output folder.

    Yield the processes, and the folder: None in all but the first. Only a ``shared`` run may have
    several processes.

    Raises:
        UserError: The device, the processes or the folder cannot be used.
    """
    machine.set_up_cpu(args.threads)
    device = machine.choose_device(args.device if "device" in args else "cpu")
    with join_workers(device, shared) as workers:
        if not workers.is_first:
            yield workers, None
            return
        with OutputFolder(args.output_dir, args.overwrite) as folder:
            yield workers, folder


def common_results(
    script: str, arguments: argparse.Namespace, workers: Workers, inputs: dict
) -> dict:
    """Return the part of results.json that all scripts share, but for what is known at the end.

    ``inputs`` is the result of :meth:`common.inputs.Inputs.describe`, or the like.
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
            "cpu": machine.cpu_name(),
            "threads": torch.get_num_threads(),
            "vnni": machine.has_vnni(),
            "device": device,
            "device_name": torch.cuda.get_device_name() if device == "cuda" else machine.cpu_name(),
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


def finish_run(
    results: dict, folder: OutputFolder, started: float, tell: Callable[[dict], Story],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Add what was written and what the run has cost, move everything into place, and print.

    ``tell`` makes the story of the results, which are changed in place; ``started`` is
    ``time.perf_counter()`` at the start.
    """
    written = {
        kind: [name for ending in endings for name in folder.names(ending)]
        for kind, endings in ARTIFACTS.items()
    }
    results["artifacts"] = results.get("artifacts", {}) | written
    results["wall_seconds"] = time.perf_counter() - started
    results["peak_memory_bytes"] = machine.peak_memory_bytes()
    story = tell(results)
    if args.report:
        write_page(story, results, folder)
    text = to_json(results)
    replace_file(folder.file(RESULTS_NAME), text.encode())
    folder.commit()
    print(text if args.json else story.text(args.output_dir), end="")
