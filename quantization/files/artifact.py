"""The INT8 model as files: written atomically, and checked in every part when loaded.

    from quantization.files.artifact import load_int8
    model = load_int8("resnet18_cifar10_int8.pth")
    logits = model(normalize(images))  # common.images.data.normalize: uint8 -> float32

A quantized model cannot be pickled whole, and should not be: the file holds tensors only, how they
were made, and a checksum. Loading builds the same structure again and fills it, and runs no code
that the file brings. Beside it lies, where TorchScript is supported, the same model frozen, which
needs nothing of this project. That one is a program: load it only from where you would run one.

    torch.backends.quantized.engine = "fbgemm"  # the engine that it was made for
    model = torch.jit.load("resnet18_cifar10_int8.torchscript.pt")
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

from common.command.cli import UserError, log
from common.files.atomic import replace_file
from common.files.untrusted import damage_told, read_sealed, write_sealed
from common.images.data import Cifar10, normalize
from common.machine.fresh_process import start_fresh
from common.network import coded
from common.network.resnet import Widths, count_weights
from quantization.coding import kernels
from quantization.coding.reference import ReferenceNetwork
from quantization.int8 import conversion, deploy, engines
from quantization.settings import ENGINES, Settings, parse_settings

FORMAT = "resnet18-cifar10-int8"
FROZEN_SUFFIX = ".torchscript.pt"
ENGINE_ENTRY = "engine"  # of the TorchScript archive
RELOAD_IMAGES = 64  # their logits are compared bit by bit after reloading


def file_name(engine: str) -> str:
    """Return the file name of an engine's INT8 model; fbgemm's is the plain one."""
    stem = "resnet18_cifar10_int8"
    return f"{stem}.pth" if engine == "fbgemm" else f"{stem}_{engine}.pth"


def save_int8(model: GraphModule, settings: Settings, path: Path) -> int:
    """Write what ``convert`` returned, whole or not at all; return the file's size in bytes."""
    content = {
        "settings": asdict(settings),
        "torch": str(torch.__version__),
        "state_dict": model.state_dict(),
    }
    write_sealed(content, FORMAT, path)
    return path.stat().st_size


def load_int8(path: str | Path) -> nn.Module:
    """Load an INT8 model, plain or coded, that maps images to logits on the CPU.

    Images are normalised, (N, 3, 32, 32); logits (N, 10).

    An image that holds NaN or infinite values gets logits of NaN, as in FP32.

    Warns when the CPU at hand lacks what the model was made for. A call of the model sets its
    engine in ``torch.backends.quantized``, where it stays.

    Raises:
        UserError: No such file, damaged, of another format, or for an engine that is not here.
    """
    path = Path(path)
    if path.suffix.lower() == coded.SUFFIX:
        network = coded.load_coded(path)
        here = engines.candidate_engines()
        if not here:
            return _with_nan_kept(ReferenceNetwork(network))
        supported = torch.backends.quantized.supported_engines
        elsewhere = [engine for engine in ENGINES if engine not in supported]
        if network.settings.get("engine") in elsewhere:  # made on another machine
            network = replace(network, settings={**network.settings, "engine": here[0]})
        with damage_told(path, "INT8 model", ValueError, RuntimeError):
            model, settings = kernels.to_int8(network)
    else:
        model, settings = _load_plain(path)
    if engines.saturates(settings.engine) and not settings.reduce_range:
        log.warning(
            "%s uses 8-bit activations; this CPU has no VNNI, where sums saturate and accuracy is "
            "lost: quantize it again here",
            path,
        )
    return _with_nan_kept(deploy.Deployed(model, settings.engine))


def _with_nan_kept(model: nn.Module) -> nn.Module:
    """Have a model return NaN for images that are not finite, of which INT8 would make levels."""

    def add_nan(_: nn.Module, images: tuple, named: dict, logits: torch.Tensor) -> torch.Tensor:
        (pixels,) = (*images, *named.values())
        return logits + 0 * pixels.sum((1, 2, 3))[:, None]  # 0 times NaN or infinity is NaN

    model.register_forward_hook(add_nan, with_kwargs=True)
    return model


def _load_plain(path: Path) -> tuple[GraphModule, Settings]:
    content = read_sealed(path, FORMAT)
    with damage_told(path, "INT8 model", ValueError, RuntimeError, TypeError, AttributeError):
        settings, state = parse_settings(content.get("settings")), content.get("state_dict")
        if not isinstance(state, dict):
            raise ValueError("no state dict")
        # A convolution kept in FP32 is fused with the ReLU after it, and is the first of the two.
        weights = {name.replace("conv1.0.", "conv1."): value for name, value in state.items()}
        widths = Widths.of(weights)
        if count_weights(widths) > path.stat().st_size:  # a weight takes a byte at least
            raise ValueError("fewer bytes than weights")
        model = conversion.build_skeleton(settings, widths)
        template = model.state_dict()  # carries the versions that torch's modules ask for
        _check_state(state, template)
        with engines.quiet_torch(settings.engine):
            template.update(item for item in state.items() if not isinstance(item[1], torch.dtype))
            model.load_state_dict(template)
    return model, settings


def _check_state(state: Mapping[str, object], template: Mapping[str, object]) -> None:
    """Check all that the kernels take on trust.

    Raises:
        ValueError: A tensor is missing, of another shape or type, or holds what no model has.
    """
    tensors, expected = dict(_named_tensors(state)), dict(_named_tensors(template))
    if tensors.keys() != expected.keys():
        raise ValueError(f"{min(tensors.keys() ^ expected.keys())} is missing or unexpected")
    for name, like in expected.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype, tensor.layout) != (like.shape, like.dtype, like.layout):
            raise ValueError(f"{name} has another shape or type")
        values = tensor
        if tensor.is_quantized:
            if tensor.qscheme() != like.qscheme() or tensor.q_per_channel_zero_points().any():
                raise ValueError(f"{name} is not quantized symmetrically by channel")
            values = tensor.q_per_channel_scales()
            if (tensor.q_per_channel_axis(), len(values)) != (0, len(tensor)):
                raise ValueError(f"{name} has no scale for each channel")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if (tensor.is_quantized or "scale" in name) and not (values > 0).all():
            raise ValueError(f"a scale of {name} is not positive")
        if "zero_point" in name and not ((tensor >= 0) & (tensor <= 255)).all():
            raise ValueError(f"{name} is outside of 0 to 255")


def _named_tensors(state: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a state dict; the linear layer's weight and bias lie in a tuple."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{i}", t) for i, t in enumerate(value) if torch.is_tensor(t))


def save_frozen(model: GraphModule, engine: str, path: Path) -> int:
    """Write what ``convert`` returned as frozen TorchScript, whole or not at all; return its bytes.

    The model's engine is kept in the file.
    """
    frozen = deploy.freeze(deploy.flatten(model, engine), engine=engine)
    entries = {ENGINE_ENTRY: engine}
    with engines.quiet_torch(engine):
        replace_file(path, lambda file: torch.jit.save(frozen, file, _extra_files=entries))
    return path.stat().st_size


def load_frozen(path: str | Path) -> torch.jit.ScriptModule:
    """Load what :func:`save_frozen` wrote, for the engine that it names, which is set and stays.

    torch packs the weights anew for the engine that is set, and would do so for another without
    a word.

    TorchScript is a program, and loading it runs it: unlike :func:`load_int8`, this is for files
    from where you would run a program from.

    Raises:
        UserError: No such file, damaged, or without its engine.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    errors = (zipfile.BadZipFile, RuntimeError, ValueError)
    with damage_told(path, "frozen INT8 model", *errors):
        with zipfile.ZipFile(path) as archive:
            (entry,) = (n for n in archive.namelist() if n.endswith(f"/extra/{ENGINE_ENTRY}"))
            engine = archive.read(entry).decode()
        engines.require_engine(engine)
        torch.backends.quantized.engine = engine
        with engines.quiet_torch():
            # Loading warns once from C++, past Python's filters; after this it no longer does.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            return torch.jit.load(path, map_location="cpu")


@contextlib.contextmanager
def verifying_reloaded(deployed: Mapping[Path, nn.Module], test: Cifar10) -> Iterator[None]:
    """Load saved INT8 models in a fresh process and demand the logits of those in memory.

    Proves that the files alone are enough: nothing of this process's state is there. They are
    loaded beside what the block does, and compared at its end.

    Args:
        deployed: By its file's path each model that was saved, as it is run; the files in any form
            that can be loaded.
        test: Some of these images are run through all.

    Raises:
        UserError: A reloaded model computes something else.
    """
    images = normalize(test.images[:RELOAD_IMAGES])
    with start_fresh(_run_saved, [*deployed], images.numpy()) as wait:
        yield
        logits = wait()
    for path, rows in zip(deployed, logits, strict=True):
        with torch.inference_mode():
            expected = deployed[path](images)
        reloaded = torch.from_numpy(rows)
        if not torch.equal(expected, reloaded):
            worst = float((expected - reloaded).abs().max())
            raise UserError(f"{path.name}: reloaded logits differ by up to {worst:.3g}; not kept")
        log.info("%s: reloaded in a fresh process, logits bit-equal", path.name)


def _run_saved(paths: Sequence[Path], images: np.ndarray) -> list[np.ndarray]:
    """Return the logits (float32, (N, 10)) of saved models."""
    logits = []
    for path in paths:
        model = (load_frozen if path.name.endswith(FROZEN_SUFFIX) else load_int8)(path)
        with torch.inference_mode():
            logits.append(model(torch.from_numpy(images)).numpy())
    return logits
