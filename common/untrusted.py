"""Files from anywhere: reading them runs no code that they bring, and ends in one line at worst."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.cli import UserError

MAX_UNPACKED_BYTES = 1 << 30  # a ResNet18 in FP64 with its optimizer is 0.3 GB
NO_CHECKPOINT = "truncated, damaged or no PyTorch checkpoint"


def read_untrusted(path: Path) -> object:
    """Return what ``torch.save`` or safetensors put into a file: tensors and plain values alone.

    Raises:
        UserError: It is missing, damaged, far too large, something else, or holds Python objects.
    """
    head = _check_file(path)
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError:
            raise UserError(f"{path}: truncated, damaged or no safetensors file") from None
    if head[:4] == b"PK\x03\x04":
        _check_archive(path)
    return _unpickle(path)


def _check_file(path: Path) -> bytes:
    """Check what can be told without reading it all; return the first bytes."""
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
    return head


def _unpickle(path: Path) -> object:
    """Read with torch, which builds nothing but tensors and plain values."""
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
