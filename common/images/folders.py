"""Image folders ``train/<class>/*`` and ``test/<class>/*``, read as torchvision's ImageFolder."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.command.cli import UserError, log
from common.images.decoding import Sizing, decode_images, read_size
from common.images.loading import Source, Split
from common.images.normalisation import NORMALISATIONS

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
STRAY = {"__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"}  # systems leave them
SIZE_SAMPLE = 100  # images of a split whose size is read
DEFAULT_SIZE = Sizing(224, 224, 224)
CIFAR_SIDE = 32  # side in pixels up to which images are normalised as CIFAR-10


def find_splits(data_dir: Path) -> dict[str, Path]:
    """Return the folder of each split, ``train`` and ``test``, that is there."""
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        folders = (data_dir / name for name in names)
        if folder := next((folder for folder in folders if folder.is_dir()), None):
            found[split] = folder
    return found


def folder_source(data_dir: Path, sizing: Sizing | None = None) -> Source:
    """Read image folders; classes are the sorted names of the folders.

    Without a sizing, images keep their own size if a sample of them shares one; else they are
    brought to 224×224. Those of 32×32 pixels are normalised as CIFAR-10, others as ImageNet.

    Raises (here, or when a split is opened or read):
        UserError: A class is missing or empty, or a file is no 8-bit image.
    """
    folders = find_splits(data_dir)
    classes = {split: _class_names(folder) for split, folder in folders.items()}
    for split, other in itertools.permutations(sorted(folders), 2):  # else labels would not agree
        if missing := sorted(set(classes[other]) - set(classes[split])):
            raise UserError(f"{folders[split]}: class {missing[0]} is missing, which is in "
                            f"{folders[other].name}/")  # fmt: skip
    names = next(iter(classes.values()))
    files = {split: _list_files(folder, names) for split, folder in folders.items()}
    sizing = sizing or _find_own_size(paths for paths, _ in files.values())

    def open_split(split: str) -> Split:
        if split not in files:
            raise UserError(f"{data_dir}: has no folder {split}/ with images by class")
        paths, labels = files[split]

        def read(indices: np.ndarray) -> np.ndarray:
            chosen = ((str(paths[i]), paths[i].read_bytes) for i in indices)
            return decode_images(chosen, len(indices), sizing)

        return Split(labels, read)

    is_small = max(sizing.height, sizing.width) <= CIFAR_SIDE
    mean, std = NORMALISATIONS["cifar10" if is_small else "imagenet"]
    description = f"the image folders in {data_dir}"
    return Source("folder", description, open_split, names, mean, std, resize=sizing.short_side)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = tuple(sorted(set(names) - STRAY))
    if not classes:
        raise UserError(f"{folder}: no class folders with images")
    return classes


def _list_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """Return the images of a split and their labels; warn of what else lies among them."""
    paths, labels, others = [], [], []
    for label, name in enumerate(classes):
        found = {True: [], False: []}
        with os.scandir(folder / name) as entries:  # knows a file without asking for each
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in STRAY:
                    path = folder / name / entry.name
                    is_image = path.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()
                    found[is_image].append(path)
        if not found[True]:
            raise UserError(f"{folder / name}: no images")
        paths += sorted(found[True])
        labels += [label] * len(found[True])
        others += found[False]
    if others:
        log.warning(
            "%s: %d passed over, such as %s; images are files that end in %s",
            folder, len(others), min(others).relative_to(folder), ", ".join(sorted(IMAGE_SUFFIXES)),
        )  # fmt: skip
    return paths, np.asarray(labels, dtype=np.int64)


def _find_own_size(splits: Iterable[Sequence[Path]]) -> Sizing:
    """Return the size that a sample of the images share; else the default."""
    sizes = set()
    for paths in splits:
        step = max(1, len(paths) // SIZE_SAMPLE)
        sizes |= {read_size(str(path), path.read_bytes) for path in paths[::step]}
    if len(sizes) == 1:
        return Sizing(*sizes.pop())
    log.info("images of different sizes: scaled and cut to %d×%d pixels; --image-size takes "
             "another", *DEFAULT_SIZE[:2])  # fmt: skip
    return DEFAULT_SIZE
