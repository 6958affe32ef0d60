"""CIFAR-10 and CIFAR-100: their Python batches, the download of CIFAR-10, its bundled images."""

import contextlib
import functools
import io
import logging
import lzma
import socket
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from common.command.cli import UserError, log
from common.images.decoding import Sizing, decode_images, resize_pixels
from common.images.loading import Source, Split
from common.images.normalisation import MEAN, STD

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
OWN_SIZE = Sizing(32, 32)
BATCHES_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-py", "cifar-100-python"
# Of each socket operation, so that a stalled download ends and a slow one does not.
DOWNLOAD_TIMEOUT_SECONDS = 20.0
ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED_ARCHIVES = {
    "train": ASSETS / "cifar10_jpeg_train_2000.tar.xz",
    "test": ASSETS / "cifar10_jpeg_test.tar.xz",
}


def batches_source(data_dir: Path, folder: str, sizing: Sizing) -> Source:
    """Read CIFAR-10's or CIFAR-100's Python batches; they are pickles, so their MD5 is checked."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if folder == BATCHES_FOLDER else CIFAR100

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


def download_cifar10(data_dir: Path) -> None:
    """Download CIFAR-10 into ``data_dir``; it appears there complete or not at all.

    A failure of network or disk is an OSError or an HTTPException, a wrong MD5 a RuntimeError.
    """
    from torchvision.datasets import CIFAR10

    log.info("downloading CIFAR-10 (170 MB) to %s", data_dir)
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as staging:
            with contextlib.ExitStack() as muted:
                # torchvision prints to stdout, which belongs to the results.
                muted.enter_context(contextlib.redirect_stdout(io.StringIO()))
                if not log.isEnabledFor(logging.INFO):  # --quiet: no progress bar either
                    muted.enter_context(contextlib.redirect_stderr(io.StringIO()))
                CIFAR10(staging, download=True)
            try:
                (Path(staging) / BATCHES_FOLDER).rename(data_dir / BATCHES_FOLDER)
            except OSError:
                if not (data_dir / BATCHES_FOLDER).exists():  # where it does, another was faster
                    raise
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def bundled_source(sizing: Sizing = OWN_SIZE) -> Source:
    """Read the bundled JPEG re-encodings: 10,000 test and 2,000 training images."""

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


def open_archive(path: Path) -> tuple[tarfile.TarFile, list[tarfile.TarInfo], np.ndarray]:
    """Open a tar.xz of images ``…/<class>/…``: the tar, its images, their labels (int64, (N,))."""
    unpacked = io.BytesIO(lzma.decompress(path.read_bytes()))
    tar = tarfile.open(fileobj=unpacked)  # noqa: SIM115  (its images are read later)
    members = sorted((m for m in tar if m.isfile()), key=lambda member: member.name)
    return tar, members, np.array([CLASSES.index(m.name.split("/")[1]) for m in members], np.int64)
