"""The INT8 model as a file: written atomically, loaded without running code that it brings.

    from quantization.artifact import load_int8
    model = load_int8("resnet18_cifar10_int8.pth")
    logits = model(normalize(images))  # common.data.normalize: uint8 -> float32

A quantized model cannot be pickled whole, and should not be: the file holds tensors only, and how
they were made. Loading builds the same structure again and fills it.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.fx import GraphModule

from common import report
from common.cli import UserError, log
from common.output import replace_file
from quantization import engines
from quantization.engines import Settings

FORMAT = "resnet18-cifar10-int8"


def save_int8(model: GraphModule, settings: Settings, path: Path) -> int:
    """Write an INT8 model whole or not at all; return its size in bytes."""
    content = {
        "format": FORMAT,
        "settings": asdict(settings),
        "torch": str(torch.__version__),
        "state_dict": model.state_dict(),
    }
    replace_file(path, lambda file: torch.save(content, file))
    return path.stat().st_size


def load_int8(path: str | Path) -> GraphModule:
    """Load an INT8 model; it maps normalised images (N, 3, 32, 32) to logits (N, 10) on the CPU.

    Warns when the CPU at hand lacks what the model was made for.

    Raises:
        UserError: No such file, damaged, of another format, or for an engine that is not here.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with engines.quiet_torch():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: damaged or no INT8 model ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not written by quantization.py")
    settings = Settings(**content["settings"])
    saturates = settings.engine in engines.SATURATING_ENGINES and not report.has_vnni()
    if saturates and not settings.reduce_range:
        log.warning(
            "%s uses 8-bit activations; this CPU has no VNNI, where sums saturate and accuracy is "
            "lost: quantize it again here",
            path,
        )
    model = engines.build_skeleton(settings)
    with engines.quiet_torch(settings.engine):
        model.load_state_dict(content["state_dict"])
    return model


def logits_in_fresh_process(path: Path, images: torch.Tensor, threads: int) -> torch.Tensor:
    """Load the file in a new Python process and return its logits (float32, (N, 10)) on images.

    Proves that the file alone is enough: nothing of this process's state is there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        rows = executor.submit(_run_saved, path, images.numpy(), threads).result()
    return torch.from_numpy(rows)


def _run_saved(path: Path, images: object, threads: int) -> object:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return load_int8(path)(torch.from_numpy(images)).numpy()
