"""Where pixels come from: CIFAR's archives, image folders, or the bundled images."""

import argparse
import functools
import http.client
import io
import lzma
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.command.cli import UserError, log
from common.command.image_arguments import DEFAULT_DATA_DIR
from common.images.cifar10 import CLASSES, IMAGE_SIZE, MEAN, STD
from common.images.decoding import decode_images, resize_pixels
from common.images.download import BATCHES_FOLDER, CIFAR100_FOLDER, download_cifar10
from common.images.folders import folder_source, has_image_folders
from common.images.normalisation import NORMALISATIONS, Statistics
from common.images.source import OWN_SIZE, SizeRequest, Source, Split

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED_ARCHIVES = {
    "train": ASSETS / "cifar10_jpeg_train_2000.tar.xz",
    "test": ASSETS / "cifar10_jpeg_test.tar.xz",
}
SHOWN_ENTRIES = 8  # of a folder that is not recognised


def open_source(
    data_dir: Path, bundled: bool = False, allow_bundled: bool = True,
    size: SizeRequest = OWN_SIZE, is_given: bool = False,
) -> Source:  # fmt: skip
    """Find images: CIFAR's batches or image folders in ``data_dir``, or the bundled images.

    CIFAR-10 is downloaded to an empty folder. Where that fails, the bundled images take its place
    with a warning, if that is allowed and the user did not name the folder (``is_given``).

    Raises:
        UserError: The folder is missing, damaged or not recognised, or the download failed.
    """
    if bundled:
        return bundled_source(size)
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir}: not a folder")
    for folder in (BATCHES_FOLDER, CIFAR100_FOLDER):
        if (data_dir / folder).exists():
            return batches_source(data_dir, folder, size)
    if has_image_folders(data_dir):
        return folder_source(data_dir, size)
    if is_given:
        _refuse_other_content(data_dir)
    try:
        download_cifar10(data_dir)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error or type(error).__name__
        reason = f"CIFAR-10 is not in {data_dir} and could not be downloaded ({cause})"
        if is_given or not allow_bundled:
            raise UserError(reason) from error
        log.warning("%s: going on with the bundled JPEG images", " ".join(reason.split()))
        return bundled_source(size)
    return batches_source(data_dir, BATCHES_FOLDER, size)


def open_chosen_source(args: argparse.Namespace, found: Statistics | None = None) -> Source:
    """Open the source that the flags ask for, see :func:`open_source`.

    ``--mean`` and ``--std``, else ``--normalize``, else what was ``found`` in the checkpoint take
    the place of the source's own constants; ``--normalize auto`` leaves these.
    """
    chosen = vars(args).get
    source = open_source(
        args.data_dir, args.bundled, not args.no_bundled,
        SizeRequest(chosen("image_size"), chosen("resize")),
        is_given=args.data_dir != DEFAULT_DATA_DIR,
    )  # fmt: skip
    mean, std = NORMALISATIONS.get(chosen("normalize"), (source.mean, source.std))
    uses_found = found is not None and chosen("normalize") is None
    if uses_found:
        mean, std = found
    mean, std = chosen("mean") or mean, chosen("std") or std
    if uses_found:
        log.info("normalisation: mean %s and std %s; the checkpoint holds them", mean, std)
    return replace(source, mean=mean, std=std, channel_order=chosen("channel_order") or "rgb")


def _refuse_other_content(data_dir: Path) -> None:
    if not data_dir.exists():
        raise UserError(f"{data_dir}: no such folder; make it to have CIFAR-10 downloaded there")
    entries = sorted(path for path in data_dir.iterdir() if not path.name.startswith("."))
    for other in (data_dir.absolute().parent, *entries) if entries else ():
        if os.access(other, os.X_OK) and has_image_folders(other, all):
            raise UserError(f"{data_dir}: has no folders train/ and test/; {other} has them")
    if names := [path.name + "/" * path.is_dir() for path in entries]:
        shown = ", ".join(names[:SHOWN_ENTRIES]) + (", …" if len(names) > SHOWN_ENTRIES else "")
        raise UserError(
            f"{data_dir}: neither {BATCHES_FOLDER}/ nor {CIFAR100_FOLDER}/ nor image folders "
            f"train/<class>/ and test/<class>/ (or val/<class>/) are there, but {shown}"
        )


# --- CIFAR's archives ----------------------------------------------------------------------------


def batches_source(
    data_dir: Path, folder: str = BATCHES_FOLDER, size: SizeRequest = OWN_SIZE
) -> Source:
    """Read CIFAR-10's or CIFAR-100's Python batches; they are pickles, so their MD5 is checked."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if folder == BATCHES_FOLDER else CIFAR100
    sizing = size.sizing((IMAGE_SIZE, IMAGE_SIZE))

    def load(split: str) -> CIFAR10:
        try:
            return kind(data_dir, train=split == "train")
        except RuntimeError:
            advice = "; delete that folder to have it downloaded again" * (kind is CIFAR10)
            raise UserError(
                f"{data_dir / folder}: incomplete or damaged (MD5 differs){advice}"
            ) from None

    def open_split(split: str) -> Split:
        dataset = load(split)
        labels = np.asarray(dataset.targets, dtype=np.int64)
        return Split(labels, lambda indices: resize_pixels(dataset.data[indices], sizing))

    classes = CLASSES if kind is CIFAR10 else tuple(load("test").classes)
    description = f"CIFAR-{len(classes)} in {data_dir}"
    name = kind.__name__.lower()
    return Source(name, description, open_split, classes, MEAN, STD, resize=sizing.short_side)


# --- bundled images ------------------------------------------------------------------------------


def open_archive(path: Path) -> tuple[tarfile.TarFile, list[tarfile.TarInfo], np.ndarray]:
    """Open a tar.xz of images ``…/<class>/…``: the tar, its images, their labels (int64, (N,))."""
    unpacked = io.BytesIO(lzma.decompress(path.read_bytes()))
    tar = tarfile.open(fileobj=unpacked)  # noqa: SIM115  (its images are read later)
    members = sorted((m for m in tar if m.isfile()), key=lambda member: member.name)
    return tar, members, np.array([CLASSES.index(m.name.split("/")[1]) for m in members], np.int64)


def bundled_source(size: SizeRequest = OWN_SIZE) -> Source:
    """Read the bundled JPEG re-encodings: 10,000 test and 2,000 training images."""
    sizing = size.sizing((IMAGE_SIZE, IMAGE_SIZE))

    @functools.cache  # training images are opened again for other purposes
    def open_split(split: str) -> Split:
        archive = BUNDLED_ARCHIVES[split]
        try:
            tar, members, labels = open_archive(archive)
        except (OSError, lzma.LZMAError, tarfile.TarError) as error:
            raise UserError(f"{archive}: bundled images are missing or damaged ({error})") from None

        def read(indices: np.ndarray) -> np.ndarray:
            chosen = (members[i] for i in indices)
            files = ((m.name, tar.extractfile(m).read) for m in chosen)
            return decode_images(files, len(indices), sizing)

        return Split(labels, read)

    description = "the bundled JPEG images"
    return Source("bundled", description, open_split, CLASSES, MEAN, STD, resize=sizing.short_side)
