"""CIFAR-10 in memory: whole splits as uint8 tensors, subsets of them, and normalised batches.

32×32 images belong in one tensor, not in worker processes: 10,000 of them are 31 MB. A batch is
one slice of that tensor, normalised at once; :mod:`common.images.sources` says where the pixels
come from.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.command.cli import UserError, log
from common.images.cifar10 import MEAN, STD
from common.images.sources import Source

# Splits are refused if this share of the smaller one is in the other as well.
MAX_SHARED = 0.9


@dataclass(frozen=True)
class Cifar10:
    """Images and their classes, held in memory once.

    Attributes:
        images: uint8, shape (N, 3, 32, 32), RGB.
        labels: int64, shape (N,), indices into :data:`common.images.cifar10.CLASSES`.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Cifar10:
        """Return the dataset on ``device``, so that batches are made there."""
        return Cifar10(self.images.to(device), self.labels.to(device))

    def rows(self, rows: slice | torch.Tensor) -> Cifar10:
        """Return some of the images: a slice of them, which shares memory, or by index or mask."""
        return Cifar10(self.images[rows], self.labels[rows])

    def halves(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of two disjoint, class-balanced halves: to choose on, to confirm on.

        Each (int64, on the CPU) is shuffled as a subset is, see :func:`balanced_subset`.

        Raises:
            UserError: There is only one image.
        """
        if len(self) < 2:
            raise UserError(
                "choosing on one half of the images and confirming on the other takes two"
            )
        labels = self.labels.cpu().numpy()
        dealt = balanced_subset(labels, len(self), seed)
        by_class = dealt[np.argsort(labels[dealt], kind="stable")]
        second = np.isin(dealt, by_class[1::2])  # every other image of a class
        return torch.from_numpy(dealt[~second]), torch.from_numpy(dealt[second])


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_images(source: Source, split: str, count: int | None, seed: int, skip: int = 0) -> Cifar10:
    """Read ``count`` images of a split into memory.

    Args:
        source: Where images come from, from :func:`common.images.sources.open_source`.
        split: ``train`` or ``test``.
        count: Size of the class-balanced subset; None for the whole split.
        seed: Chooses and shuffles, see :func:`balanced_subset`; the same seed does the same.
        skip: Leave out those that the same seed would choose as a subset of this size, so that
            the two have no image in common.

    Raises:
        UserError: The split is missing, unreadable, or has too few images.
    """
    available = source.open_split(split)
    if count is not None and skip + count > len(available.labels):
        raise UserError(
            f"{skip + count} {split} images asked for, only {len(available.labels)} in "
            f"{source.description}"
        )
    if count is None:
        count = len(available.labels) - skip
    indices = balanced_subset(available.labels, count, seed, skip)
    pixels = available.read(indices)
    return Cifar10(torch.from_numpy(pixels), torch.from_numpy(available.labels[indices]))


def check_disjoint(training: Cifar10, test: Cifar10, place: str) -> None:
    """Warn if some training images are test images as well, pixel for pixel.

    Args:
        training: Images that the run compresses or trains on.
        test: Images that it measures accuracy on.
        place: Description of where both come from, for the message.

    Raises:
        UserError: Nearly all of them are.
    """
    shared = len(_digests(training) & _digests(test))
    told = (
        f"{place}: {shared:,} of {len(training):,} training images are among the {len(test):,} "
        "test images"
    )
    if shared > MAX_SHARED * min(len(training), len(test)):
        raise UserError(f"{told}; train and test must hold different images")
    if shared:
        log.warning("%s: accuracies on them are too high", told)


def _digests(dataset: Cifar10) -> set[bytes]:
    images = dataset.images.cpu().contiguous()
    return {hashlib.sha256(image.data).digest() for image in images.numpy()}


def balanced_subset(labels: np.ndarray, count: int, seed: int, skip: int = 0) -> np.ndarray:
    """Choose ``count`` indices, the same number of each class, at random and in random order.

    Folders lie sorted by class. Here every slice of the subset, such as a batch, has as many images
    of each class as its length allows. Where ``count`` is no multiple of the number of classes, or
    a class has too few images, other classes chosen at random give one more.

    Args:
        labels: int64, shape (N,).
        count: At most N.
        seed: Of the choice.
        skip: Leave out the subset of this size; skip + count is at most N.

    Returns:
        Indices, int64, shape (count,).
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    # Deal the images like cards: the k-th image of every class before the (k+1)-th of any.
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank_in_class[members] = np.arange(len(members))
    order = shuffled[np.argsort(rank_in_class[shuffled], kind="stable")]
    return order[skip : skip + count]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images (N, 3, H, W) into the network's float32 input, laid out channels_last.

    The same arithmetic, in the same order, as torchvision's ``ToTensor`` and ``Normalize``.
    """
    mean, std = _mean_and_std(images.device)
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(mean).div_(std)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both, shape (1, 3, 1, 1); made once, for each copy to a GPU waits for its queue."""
    with torch.inference_mode(False):  # usable in training, whoever asks first
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return mean, std


def batches(dataset: Cifar10, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised batches, in order: images float32 (n, 3, 32, 32), labels."""
    for start in range(0, len(dataset), batch_size):
        part = dataset.rows(slice(start, start + batch_size))
        yield normalize(part.images), part.labels
