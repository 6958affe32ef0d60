"""Checkpoints: finding and writing one, reading every layout into the canonical state dict.

Reading never runs code that a file brings (``weights_only=True``, always), and ends in weights that
fit the network, or in one line that says why not.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.cli import REPOSITORY, UserError, log
from common.data import normalize
from common.model import CLASS_COUNT, ResNet18
from common.output import replace_file
from common.sources import ASSETS

WEIGHTS_NAME = "resnet18_cifar10.pth"
BUNDLED_WEIGHTS = ASSETS / "resnet18_cifar10_fp16.pth"
MAX_UNPACKED_BYTES = 1 << 30  # a ResNet18 in FP64 with its optimizer is 0.3 GB
NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# torchvision's names, and what wrappers put before them.
RENAMES = (
    (re.compile(r"^(module\.|_orig_mod\.)+"), ""),
    (re.compile(r"\.downsample\."), ".shortcut."),
    (re.compile(r"^fc\."), "linear."),
)

NO_CHECKPOINT = "truncated, damaged or no PyTorch checkpoint"

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint's path and where it was found, in words."""

    path: Path
    found: str

    def describe(self) -> dict:
        """Return results.json's ``weights``: where the file was found, the SHA-256 of its bytes."""
        digest = hashlib.sha256(self.path.read_bytes())
        return {"source": self.found, "sha256": digest.hexdigest()}


def find_weights(chosen: Path | None, script_dir: Path) -> WeightsFile:
    """Find the checkpoint: ``chosen``; else the usual places; else the bundled weights.

    Raises:
        UserError: ``chosen`` is not a readable file.
    """
    if chosen is not None:
        return WeightsFile(chosen, f"--weights {chosen}")
    places = {
        "the working directory": Path.cwd(),
        "the script's folder": script_dir,
        "the repository root": REPOSITORY,
    }
    for name, folder in places.items():
        if (folder / WEIGHTS_NAME).is_file():
            return WeightsFile(folder / WEIGHTS_NAME, f"{WEIGHTS_NAME} in {name}")
    return WeightsFile(BUNDLED_WEIGHTS, "the bundled weights")


def load_model(path: Path) -> ResNet18:
    """Return the network with the checkpoint's weights, in eval mode, FP32, on the CPU.

    Raises:
        UserError: See :func:`read_checkpoint`; or its numbers are too large to compute with.
    """
    model = ResNet18()
    model.load_state_dict(read_checkpoint(path))
    _check_activations(path, model.eval())
    return model


def read_checkpoint(path: Path) -> StateDict:
    """Read a checkpoint in any accepted layout into the canonical state dict (FP32).

    Accepted: the course's names or torchvision's with a CIFAR stem, ``module.`` prefixes, nesting
    under one of ``NESTING_KEYS``, any of ``WEIGHT_DTYPES``, ``.pth`` and ``.safetensors``.

    Raises:
        UserError: The file is missing, no checkpoint, unsafe, damaged, or of another network.
    """
    tensors = _rename(path, _unnest(path, _read_file(path)))
    _check_architecture(path, tensors)
    expected = ResNet18().state_dict()
    for name, value in expected.items():  # old checkpoints lack this counter, which eval ignores
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros_like(value))
    _check_names_and_shapes(path, tensors, expected)
    _check_values(path, tensors)
    dtypes = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()
    }
    if dtypes != {"float32"}:
        name = "the bundled weights" if path == BUNDLED_WEIGHTS else path
        log.info("%s: %s weights, converted to float32", name, " and ".join(sorted(dtypes)))
    return {name: tensors[name].to(value.dtype).contiguous() for name, value in expected.items()}


def _check_activations(path: Path, model: ResNet18) -> None:
    """Run a black, a white and a noisy image: weights may be finite and what they give not."""
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.zeros_like(noise), torch.full_like(noise, 255), noise])
    with torch.inference_mode():
        if not torch.isfinite(model(normalize(images.to(torch.uint8)))).all():
            raise UserError(
                f"{path}: weights so large that the network's logits are NaN or infinite"
            )


def serialize(content: object) -> bytes:
    """Return what ``torch.save`` writes of ``content``: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_checkpoint(content: object, path: Path) -> None:
    """Write ``content`` as ``torch.save`` does, whole or not at all.

    By way of memory: where a disk is full, torch's own writer ends in an internal error.
    """
    replace_file(path, lambda file: file.write(serialize(content)))


def _read_file(path: Path) -> object:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise UserError(f"{path}: empty file")
    if size_bytes > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: {size_bytes:,} bytes is too large for a ResNet18")
    with path.open("rb") as file:
        head = file.read(512)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        raise UserError(f"{path}: an HTML page, not weights; download it with a browser")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not weights; run 'git lfs pull'")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError:
            raise UserError(f"{path}: truncated, damaged or no safetensors file") from None
    if head[:4] == b"PK\x03\x04":
        _check_archive(path)
    try:
        with warnings.catch_warnings():  # torch's remarks on odd pickles; what counts is said here
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds a Python object ({found[1]}), which is never loaded; save the "
                "model's state_dict() alone"
            ) from None
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None
    except Exception:  # a hostile or cut file makes torch's reader fail in too many ways to list
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None


def _check_archive(path: Path) -> None:
    """Check a zip checkpoint before torch reads it: torch looks at neither sizes nor CRCs."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
            if unpacked_bytes > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: unpacks to {unpacked_bytes:,} bytes; not a ResNet18")
            damaged = archive.testzip()
            members = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError,
            NotImplementedError, EOFError):  # fmt: skip
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged (checksum of {damaged} differs)")
    if "constants.pkl" in members:
        raise UserError(f"{path}: a TorchScript archive; save the model's state_dict() instead")
    if "data.pkl" not in members:
        raise UserError(f"{path}: a zip archive, but no PyTorch checkpoint")


def _unnest(path: Path, content: object) -> Mapping[str, object]:
    for key in NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a state dict but a {type(content).__name__}")
    if not content:
        raise UserError(f"{path}: an empty state dict")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: not a state dict: its keys are not names")
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: not a state dict: {_shorten([name])} is no tensor ({kind})")
        if value.is_quantized:
            raise UserError(
                f"{path}: already quantized ({_shorten([name])}); FP32 weights are needed"
            )
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path}: {_shorten([name])} is no dense tensor with values")
    return content


def _rename(path: Path, tensors: Mapping[str, torch.Tensor]) -> StateDict:
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise UserError(f"{path}: holds {_shorten([name])} twice, under two names")
        renamed[name] = value.detach()
    return renamed


def _check_architecture(path: Path, tensors: StateDict) -> None:
    """Name the two commonest mismatches in the user's terms."""
    stem, head = tensors.get("conv1.weight"), tensors.get("linear.weight")
    if stem is not None and stem.shape[-2:] == (7, 7):
        raise UserError(f"{path}: an ImageNet ResNet (7×7 stem); CIFAR-10's has a 3×3 stem")
    if head is not None and head.ndim == 2 and head.shape[0] != CLASS_COUNT:
        raise UserError(f"{path}: a network of {head.shape[0]} classes; CIFAR-10 has 10")


def _check_names_and_shapes(path: Path, tensors: StateDict, expected: StateDict) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {_shorten(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {_shorten(unexpected)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ][:1]
    if problems:
        raise UserError(f"{path}: not a ResNet18 for CIFAR-10: {'; '.join(problems)}")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_values(path: Path, tensors: StateDict) -> None:
    for name, value in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{path}: {name} is {value.dtype}; 16-, 32- or 64-bit floating point is needed"
            )
        # In FP32, what will be computed with: an FP64 value may be finite there only.
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {name} holds negative variances")
