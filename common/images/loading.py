"""Sources of images, the loading from them, and a check that training and test images differ."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.command.argument_types import AtMost
from common.command.cli import UserError, counted, log
from common.images.data import ImageSet, balanced_subset

UNBALANCED = 1.5  # ratio of the largest class to the smallest from which on the user is told
MAX_SHARED = 0.9  # share of the smaller split in the other from which on both are refused


@dataclass(frozen=True)
class Split:
    """One split: its labels, and a reader of its pixels."""

    labels: np.ndarray  # int64, (N,)
    read: Callable[[np.ndarray], np.ndarray]  # from int64 indices (n,) to uint8 (n, 3, H, W)


@dataclass(frozen=True)
class Source:
    """A place with a train and a test split; the other fields are those of its image sets."""

    name: str  # ``cifar10``, ``cifar100``, ``folder`` or ``bundled``, as in results.json
    description: str  # the place in words, for messages
    open_split: Callable[[str], Split]  # opens ``train`` or ``test``; may raise UserError
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str = "rgb"
    resize: int | None = None


def load_images(
    source: Source, split: str, count: int | None, seed: int, skip: int = 0, flag: str | None = None
) -> ImageSet:
    """Read images of a split, ``train`` or ``test``, as :func:`balanced_subset` chooses them.

    None takes the whole split; a default (:class:`AtMost`) takes what there is, up to it. The
    subset of size ``skip`` is left out. Messages name the ``flag`` that asks for the number.

    Raises:
        UserError: The split is missing, unreadable, or has too few images.
    """
    available = source.open_split(split)
    total = len(available.labels)
    skip = min(skip, total) if isinstance(skip, AtMost) else skip
    if isinstance(count, AtMost) and total > skip:
        count = min(count, total - skip)
    if count is not None and skip + count > total:
        asked = f"{flag} {count}" if flag else f"{counted(count, f'{split} image')} asked for"
        beside = f", beside {skip} for another purpose" if skip else ""
        there = counted(total, f"{split} image")
        raise UserError(f"{asked}{beside}: only {there} in {source.description}")
    if count is None:
        count = total - skip
    counts = np.bincount(available.labels, minlength=len(source.classes))
    if count < total and counts.max() > UNBALANCED * counts.min():
        least, most = counts.argmin(), counts.argmax()
        log.info(
            "the classes have from %d (%s) to %d (%s) %s images; subsets keep their proportions",
            counts[least], source.classes[least], counts[most], source.classes[most], split,
        )  # fmt: skip
    indices = balanced_subset(available.labels, count, seed, skip)
    pixels = available.read(indices)
    return ImageSet(
        torch.from_numpy(pixels), torch.from_numpy(available.labels[indices]), source.classes,
        source.mean, source.std, source.channel_order, source.resize,
    )  # fmt: skip


def check_disjoint(training: ImageSet, test: ImageSet, place: str) -> None:
    """Warn if training images, from ``place``, are test images; a UserError if nearly all are."""
    shared = len(_digests(training) & _digests(test))
    told = (
        f"{place}: {shared:,} of {len(training):,} training images are among the {len(test):,} "
        "test images"
    )
    if shared > MAX_SHARED * min(len(training), len(test)):
        raise UserError(f"{told}; train and test must hold different images")
    if shared:
        log.warning("%s: accuracies on them are too high", told)


def _digests(dataset: ImageSet) -> set[bytes]:
    images = dataset.images.cpu().contiguous()
    return {hashlib.sha256(image.data).digest() for image in images.numpy()}
