"""Files from anywhere: reading them runs no code of theirs, and fails with one line."""

import contextlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.command.cli import UserError
from common.files.inert import Inert, object_refused, read_inert

MAX_UNPACKED_BYTES = 1 << 32  # a VGG19 with the state of its optimizer is 1.7 GB
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of what torch.save writes, now and earlier


def read_untrusted(path: Path) -> object:
    """Return what ``torch.save`` or safetensors put into a file: tensors and plain values.

    Python objects beside them become :class:`common.files.inert.Inert` objects; none is built.

    Raises:
        UserError: The file is missing, damaged, too large, something else, or one Python object.
    """
    head = check_file(path)
    header_bytes = int.from_bytes(head[:8], "little")  # of a safetensors file, if it is one
    fits = head[8:9] == b"{" and 2 <= header_bytes <= path.stat().st_size - 8
    is_torch = head.startswith((ZIP, PICKLE))
    if fits or (path.suffix.lower() == ".safetensors" and not is_torch):
        try:
            return load_file(path)
        except SafetensorError:
            raise UserError(f"{path}: truncated, damaged or no safetensors file") from None
    try:
        if head.startswith(ZIP):
            _check_archive(path)
        return _unpickle(path)
    except UserError:
        raise
    except Exception:  # a hostile or cut file makes the readers fail in too many ways to list
        raise UserError(f"{path}: truncated, damaged or no PyTorch checkpoint") from None


def serialize(content: object) -> bytes:
    """Return what ``torch.save`` writes of ``content``: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def explained(problem: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a file, or the user's own code, raises in the block into one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise UserError(f"{problem} ({reason}){advice}") from None


def check_file(path: Path) -> bytes:
    """Return the first bytes of a file; a UserError if they, or its size, are no checkpoint's."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise UserError(f"{path}: empty file")
    if size_bytes > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: {size_bytes:,} bytes is too large for a checkpoint")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: an HTML page, not weights; download it with a browser")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not weights; run 'git lfs pull'")
    return head


def _unpickle(path: Path) -> object:
    """Read with torch; where it refuses Python objects or a newer pickle, without building any."""
    with warnings.catch_warnings():  # torch's remarks on odd pickles
        warnings.simplefilter("ignore")
        try:
            with path.open("rb") as file:  # of a path torch would believe the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not re.search(r"GLOBAL \S+|Unsupported operand", str(error)):
                raise
            content = read_inert(path)
    if isinstance(content, Inert) and not content:
        raise object_refused(path, content.name)
    return content


def _check_archive(path: Path) -> None:
    """Check a zip checkpoint before torch reads it: torch looks at neither sizes nor CRCs."""
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        if unpacked_bytes > MAX_UNPACKED_BYTES:
            raise UserError(f"{path}: unpacks to {unpacked_bytes:,} bytes; not a checkpoint")
        damaged = archive.testzip()
        members = {name.partition("/")[2] for name in archive.namelist()}
    if damaged is not None:
        raise UserError(f"{path}: damaged (checksum of {damaged} differs)")
    if "constants.pkl" in members:
        raise UserError(f"{path}: a TorchScript archive; save the model's state_dict() instead")
    if "data.pkl" not in members:
        raise UserError(f"{path}: a zip archive, but no PyTorch checkpoint")
