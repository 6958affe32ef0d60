"""The INT8 model as files: written atomically, loaded without running code that they bring.

    from quantization.artifact import load_int8
    model = load_int8("resnet18_cifar10_int8.pth")
    logits = model(normalize(images))  # common.data.normalize: uint8 -> float32

A quantized model cannot be pickled whole, and should not be: the file holds tensors only, and how
they were made. Loading builds the same structure again and fills it. Beside it lies, where
TorchScript is supported, the same model frozen, which needs nothing of this project:

    torch.backends.quantized.engine = "fbgemm"  # the engine that it was made for
    model = torch.jit.load("resnet18_cifar10_int8.torchscript.pt")
"""

from __future__ import annotations

import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from common.checkpoint import save_checkpoint
from common.cli import UserError, log
from common.output import replace_file
from quantization import conversion, deploy, engines
from quantization.packing import SUFFIX as PACKED_SUFFIX
from quantization.packing import load_packed
from quantization.settings import Settings, parse_settings

FORMAT = "resnet18-cifar10-int8"
FROZEN_SUFFIX = ".torchscript.pt"
ENGINE_ENTRY = "engine"  # of the TorchScript archive
# What reading a damaged or forged file can raise, out of torch.load and load_state_dict.
DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError,
    AttributeError,
)  # fmt: skip


def save_int8(model: GraphModule, settings: Settings, path: Path) -> int:
    """Write an INT8 model whole or not at all; return its size in bytes.

    Args:
        model: From :func:`quantization.conversion.convert`.
        settings: How it was made.
        path: Of the file.
    """
    content = {
        "format": FORMAT,
        "settings": asdict(settings),
        "torch": str(torch.__version__),
        "state_dict": model.state_dict(),
    }
    save_checkpoint(content, path)
    return path.stat().st_size


def load_int8(path: str | Path) -> nn.Module:
    """Load an INT8 model, plain or packed, that maps images to logits on the CPU.

    Images are normalised, (N, 3, 32, 32); logits (N, 10).

    Warns when the CPU at hand lacks what the model was made for. For the onednn engine,
    ``torch.backends.quantized.engine`` is set, as its fused kernels demand.

    Raises:
        UserError: No such file, damaged, of another format, or for an engine that is not here.
    """
    path = Path(path)
    model, settings = (load_packed if path.suffix == PACKED_SUFFIX else _load_plain)(path)
    if engines.saturates(settings.engine) and not settings.reduce_range:
        log.warning(
            "%s uses 8-bit activations; this CPU has no VNNI, where sums saturate and accuracy is "
            "lost: quantize it again here",
            path,
        )
    return deploy.deploy(model, settings.engine)


def _load_plain(path: Path) -> tuple[GraphModule, Settings]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with engines.quiet_torch():
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not written by quantization.py")
        settings = parse_settings(content.get("settings"))
        model = conversion.build_skeleton(settings)
        with engines.quiet_torch(settings.engine):
            model.load_state_dict(content.get("state_dict"))
    except DAMAGE as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: damaged or no INT8 model ({reason})") from None
    return model, settings


def save_frozen(model: GraphModule, engine: str, path: Path) -> int:
    """Write an INT8 model as frozen TorchScript, whole or not at all; return its size in bytes.

    Args:
        model: From :func:`quantization.conversion.convert`.
        engine: Its engine, kept in the file.
        path: Of the file.
    """
    frozen, entries = deploy.freeze(deploy.flatten(model, engine)), {ENGINE_ENTRY: engine}
    with engines.quiet_torch(engine):
        replace_file(path, lambda file: torch.jit.save(frozen, file, _extra_files=entries))
    return path.stat().st_size


def load_frozen(path: str | Path) -> torch.jit.ScriptModule:
    """Load what :func:`save_frozen` wrote, for the engine that it names, which is set and stays.

    torch packs the weights anew for the engine that is set, and would do so for another without
    a word.

    Raises:
        UserError: No such file, damaged, or without its engine.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (n for n in archive.namelist() if n.endswith(f"/extra/{ENGINE_ENTRY}"))
            engine = archive.read(entry).decode()
        engines.require_engine(engine)
        torch.backends.quantized.engine = engine
        with engines.quiet_torch():
            # Loading warns once from C++, past Python's filters; after this it no longer does.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            return torch.jit.load(path, map_location="cpu")
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: damaged or no frozen INT8 model ({reason})") from None


def logits_in_fresh_process(path: Path, images: torch.Tensor, threads: int) -> torch.Tensor:
    """Load the file in a new Python process and return its logits (float32, (N, 10)) on images.

    Proves that the file alone is enough: nothing of this process's state is there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        rows = executor.submit(_run_saved, path, images.numpy(), threads).result()
    return torch.from_numpy(rows)


def _run_saved(path: Path, images: object, threads: int) -> object:
    torch.set_num_threads(threads)
    model: nn.Module = (load_frozen if path.name.endswith(FROZEN_SUFFIX) else load_int8)(path)
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()
