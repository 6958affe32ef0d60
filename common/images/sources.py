"""Where CIFAR-10's pixels come from: torchvision's archive, image folders, or the bundled images.

All three answer in the same form, a :class:`Split` that knows its labels at once and reads only the
pixels that are asked for: 512 calibration images of a folder cost 512 JPEGs, not 50,000.
"""

from __future__ import annotations

import http.client
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.command.cli import UserError, log
from common.images.cifar10 import CLASSES
from common.images.decoding import decode_images
from common.images.download import BATCHES_FOLDER, download_cifar10

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED_ARCHIVES = {
    "train": ASSETS / "cifar10_jpeg_train_2000.tar.xz",
    "test": ASSETS / "cifar10_jpeg_test.tar.xz",
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass(frozen=True)
class Split:
    """One split: labels (int64, shape (N,)) and a reader from indices to pixels.

    ``read`` takes int64 indices of shape (n,) and returns uint8 pixels of shape (n, 3, 32, 32).
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A place with a train and a test split.

    Attributes:
        name: ``cifar10``, ``folder`` or ``bundled``, as in results.json.
        description: The place in words, for messages.
        open_split: Opens ``train`` or ``test``; raises UserError where it cannot be read.
    """

    name: str
    description: str
    open_split: Callable[[str], Split]


def open_source(data_dir: Path, bundled: bool = False, allow_bundled: bool = True) -> Source:
    """Find CIFAR-10: in ``data_dir``, by downloading it there, or among the bundled images.

    Args:
        data_dir: Holds ``cifar-10-batches-py/`` (downloaded when missing) or image folders.
        bundled: Use the bundled images at once.
        allow_bundled: Fall back on the bundled images, with a warning, where CIFAR-10 is neither
            there nor downloadable.

    Raises:
        UserError: What is in ``data_dir`` is damaged, or nothing was found and no fallback allowed.
    """
    if bundled:
        return bundled_source()
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir}: not a folder")
    if (data_dir / BATCHES_FOLDER).exists():
        return torchvision_source(data_dir)
    if any((data_dir / split).exists() for split in ("train", "test")):
        return folder_source(data_dir)
    try:
        download_cifar10(data_dir)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error or type(error).__name__
        reason = f"CIFAR-10 is not in {data_dir} and could not be downloaded ({cause})"
        if not allow_bundled:
            raise UserError(reason) from error
        log.warning("%s: going on with the bundled JPEG images", " ".join(reason.split()))
        return bundled_source()
    return torchvision_source(data_dir)


# --- torchvision's archive -----------------------------------------------------------------------


def torchvision_source(data_dir: Path) -> Source:
    """Read torchvision's ``cifar-10-batches-py/``; its files are pickles, so their MD5 is checked.

    Raises (when a split is opened):
        UserError: A file is missing or is not the one that CIFAR-10's authors published.
    """

    def open_split(split: str) -> Split:
        from torchvision.datasets import CIFAR10

        try:
            dataset = CIFAR10(data_dir, train=split == "train")
        except RuntimeError:
            raise UserError(
                f"{data_dir / BATCHES_FOLDER}: incomplete or damaged (MD5 differs); delete that "
                "folder to have it downloaded again"
            ) from None
        pixels = dataset.data.transpose(0, 3, 1, 2)
        labels = np.asarray(dataset.targets, dtype=np.int64)
        return Split(labels, lambda indices: np.ascontiguousarray(pixels[indices]))

    return Source("cifar10", f"CIFAR-10 in {data_dir}", open_split)


# --- image folders -------------------------------------------------------------------------------


def folder_source(data_dir: Path) -> Source:
    """Read image folders ``train/<class>/*`` and ``test/<class>/*``.

    Classes are CIFAR-10's ten names, or 0 to 9.

    Raises (when a split is opened or read):
        UserError: A class is missing, unknown or empty, or a file is no 32×32 8-bit image.
    """

    def open_split(split: str) -> Split:
        folder = data_dir / split
        if not folder.is_dir():
            raise UserError(f"{data_dir}: has no folder {split}/ with images by class")
        paths, labels = [], []
        for label, class_folder in enumerate(_class_folders(folder)):
            images = _image_files(class_folder)
            if not images:
                raise UserError(f"{class_folder}: no images")
            paths += images
            labels += [label] * len(images)

        def read(indices: np.ndarray) -> np.ndarray:
            return decode_images((str(paths[i]), paths[i].read_bytes) for i in indices)

        return Split(np.asarray(labels, dtype=np.int64), read)

    return Source("folder", f"the image folders in {data_dir}", open_split)


def _class_folders(folder: Path) -> list[Path]:
    names = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not names:
        raise UserError(f"{folder}: no class folders with images")
    classes = max(CLASSES, tuple("0123456789"), key=lambda classes: len(names & set(classes)))
    if names == set(classes):
        return [folder / name for name in classes]
    missing = [name for name in classes if name not in names]
    unknown = sorted(names - set(classes))
    problem = f"class {missing[0]} is missing" if missing else f"{unknown[0]} is no CIFAR-10 class"
    raise UserError(f"{folder}: {problem}; expected folders {', '.join(classes)}")


def _image_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # knows what is a file without asking for each
        names = [entry.name for entry in entries if entry.is_file()]
    paths = (folder / name for name in sorted(names) if not name.startswith("."))
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


# --- bundled images ------------------------------------------------------------------------------


def open_archive(path: Path) -> tuple[tarfile.TarFile, list[tarfile.TarInfo], np.ndarray]:
    """Open a tar.xz of images ``…/<class>/…``: the tar, its images, their labels (int64, (N,))."""
    unpacked = io.BytesIO(lzma.decompress(path.read_bytes()))
    tar = tarfile.open(fileobj=unpacked)  # noqa: SIM115  (its images are read later)
    members = sorted((m for m in tar if m.isfile()), key=lambda member: member.name)
    return tar, members, np.array([CLASSES.index(m.name.split("/")[1]) for m in members], np.int64)


def bundled_source() -> Source:
    """Read the bundled JPEG re-encodings: 10,000 test and 2,000 training images."""

    def open_split(split: str) -> Split:
        archive = BUNDLED_ARCHIVES[split]
        try:
            tar, members, labels = open_archive(archive)
        except (OSError, lzma.LZMAError, tarfile.TarError) as error:
            raise UserError(f"{archive}: bundled images are missing or damaged ({error})") from None

        def read(indices: np.ndarray) -> np.ndarray:
            chosen = (members[i] for i in indices)
            return decode_images((m.name, tar.extractfile(m).read) for m in chosen)

        return Split(labels, read)

    return Source("bundled", "the bundled JPEG images", open_split)
