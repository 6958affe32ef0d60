"""Files from anywhere: reading them runs no code that they bring, and ends in one line at worst.

What this project writes for itself to read, it seals: :func:`write_sealed` puts what ``torch.save``
makes of it beside a checksum and the name of its kind, and :func:`read_sealed` reads nothing but
what was written so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.command.cli import UserError
from common.files.atomic import replace_file

MAX_UNPACKED_BYTES = 1 << 30  # a ResNet18 in FP64 with its optimizer is 0.3 GB
NO_CHECKPOINT = "truncated, damaged or no PyTorch checkpoint"


def read_untrusted(path: Path) -> object:
    """Return what ``torch.save`` or safetensors put into a file: tensors and plain values alone.

    Raises:
        UserError: It is missing, damaged, far too large, something else, or holds Python objects.
    """
    head = check_file(path)
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError:
            raise UserError(f"{path}: truncated, damaged or no safetensors file") from None
    if head[:4] == b"PK\x03\x04":
        _check_archive(path, path)
    return _unpickle(path, path)


def serialize(content: object) -> bytes:
    """Return what ``torch.save`` writes of ``content``: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_sealed(content: dict, kind: str, path: Path) -> None:
    """Write a file for :func:`read_sealed`, whole or not at all.

    Args:
        content: Tensors, quantized ones too, and plain values, in dictionaries and lists.
        kind: What it is, such as ``resnet18-cifar10-int8``; another kind is refused in reading.
        path: Of the file, which is a PyTorch checkpoint.
    """
    inner = serialize(content)
    sealed = {
        "format": kind,
        "sha256": hashlib.sha256(inner).hexdigest(),
        "content": torch.frombuffer(bytearray(inner), dtype=torch.uint8),
    }
    replace_file(path, lambda file: file.write(serialize(sealed)))


def read_sealed(path: Path, kind: str) -> dict:
    """Return what :func:`write_sealed` was given, bit for bit.

    A checksum finds damage, not malice: whoever forges a file computes its checksum too. It brings
    no code all the same, but its values are what they are, and for the caller to check.

    Raises:
        UserError: It is missing, damaged, far too large, of another kind, or not sealed.
    """
    sealed = read_untrusted(path)
    if not isinstance(sealed, dict) or sealed.get("format") != kind:
        raise UserError(f"{path}: not a file of the kind {kind}")
    if "content" not in sealed:
        raise UserError(f"{path}: written by an earlier version, without a checksum; make it again")
    inner = sealed["content"]
    if (
        not isinstance(inner, torch.Tensor)
        or (inner.dtype, inner.layout, inner.device.type) != (torch.uint8, torch.strided, "cpu")
        or inner.numel() > path.stat().st_size  # a view that repeats its bytes
    ):
        raise UserError(f"{path}: {NO_CHECKPOINT}")
    file = io.BytesIO(inner.numpy().tobytes())
    if hashlib.sha256(file.getbuffer()).hexdigest() != sealed.get("sha256"):
        raise UserError(f"{path}: damaged (its checksum differs)")
    _check_archive(path, file)
    file.seek(0)
    content = _unpickle(path, file)
    if not isinstance(content, dict):
        raise UserError(f"{path}: {NO_CHECKPOINT}")
    return content


@contextlib.contextmanager
def damage_told(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the ``errors`` that a damaged file causes within the block into one line for the user.

    Raises:
        UserError: The file is damaged or is not ``what``.
    """
    try:
        yield
    except UserError:  # says already what is wrong
        raise
    except errors as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: damaged or no {what} ({reason})") from None


def check_file(path: Path) -> bytes:
    """Check what can be told without reading it all; return the first bytes.

    Raises:
        UserError: It is missing, empty, no regular file, far too large, or something else.
    """
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
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: an HTML page, not weights; download it with a browser")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not weights; run 'git lfs pull'")
    return head


def _unpickle(path: Path, file: Path | IO[bytes]) -> object:
    """Read with torch, which builds nothing but tensors and plain values."""
    try:
        with warnings.catch_warnings():  # torch's remarks on odd pickles; what counts is said here
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds a Python object ({found[1]}), which is never loaded; save the "
                "model's state_dict() alone"
            ) from None
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None
    except Exception:  # a hostile or cut file makes torch's reader fail in too many ways to list
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None


def _check_archive(path: Path, file: Path | IO[bytes]) -> None:
    """Check a zip checkpoint before torch reads it: torch looks at neither sizes nor CRCs."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
            if unpacked_bytes > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: unpacks to {unpacked_bytes:,} bytes; not a ResNet18")
            damaged = archive.testzip()
            members = {name.partition("/")[2] for name in archive.namelist()}
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError,
            NotImplementedError, EOFError):  # fmt: skip
        raise UserError(f"{path}: {NO_CHECKPOINT}") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged (checksum of {damaged} differs)")
    if "constants.pkl" in members:
        raise UserError(f"{path}: a TorchScript archive; save the model's state_dict() instead")
    if "data.pkl" not in members:
        raise UserError(f"{path}: a zip archive, but no PyTorch checkpoint")
