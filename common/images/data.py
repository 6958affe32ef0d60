"""Images in memory: whole splits as uint8 tensors, subsets of them, and normalised batches."""

import functools
import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.command.cli import UserError

MAX_BYTES_IN_MEMORY = 1 << 30  # 7,000 images of 224×224


@dataclass(frozen=True)
class ImageSet:
    """Images, their labels, and what belongs to them."""

    images: torch.Tensor  # uint8, (N, 3, H, W), RGB
    labels: torch.Tensor  # int64, (N,), indices into ``classes``
    classes: tuple[str, ...]  # names of the classes
    mean: tuple[float, ...]  # what the network expects to be subtracted from each channel, 0 to 1
    std: tuple[float, ...]  # what it expects each channel to be divided by
    channel_order: str = "rgb"  # or ``bgr`` if the network expects blue first
    # Length that the short side of an image was scaled to before its middle was cut out; None if
    # the images have their own size.
    resize: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "ImageSet":
        """Return the dataset on ``device``, so that batches are made there."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def rows(self, rows: slice | torch.Tensor) -> "ImageSet":
        """Return some of the images: a slice of them, which shares memory, or by index or mask."""
        if isinstance(rows, slice):
            return replace(self, images=self.images[rows], labels=self.labels[rows])
        indices = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        indices = indices.to(self.images.device)
        shape = (len(indices), *self.shape)
        if math.prod(shape) > MAX_BYTES_IN_MEMORY and not self.images.is_cuda:
            images = torch.from_numpy(allocate(shape))
            torch.index_select(self.images, 0, indices, out=images)
        else:
            images = self.images[indices]
        return replace(self, images=images, labels=self.labels[indices])

    def with_mirrored(self) -> "ImageSet":
        """Return the images, each followed by its mirror image."""
        pairs = torch.stack([self.images, self.images.flip(3)], dim=1).flatten(0, 1)
        return replace(self, images=pairs, labels=self.labels.repeat_interleave(2))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.images.shape[1:])

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn some of the uint8 images, (n, 3, H, W), into float32 inputs, channels_last."""
        return normalize(pixels, self.mean, self.std, self.channel_order)

    def describe(self) -> dict:
        """Return what results.json says of the images themselves."""
        return {
            "classes": list(self.classes),
            "image_size": list(self.shape[1:]),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield normalised batches, in order: images float32 (n, 3, H, W), labels."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self.normalize(self.images[rows]), self.labels[rows]

    def halves(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of two disjoint, class-balanced halves: to choose on, to confirm on.

        Each (int64, on the CPU) is in random order, as a subset is. A single image is a UserError.
        """
        if len(self) < 2:
            raise UserError("choosing on one half of the images and confirming on the other takes "
                            "two")  # fmt: skip
        labels = self.labels.cpu().numpy()
        dealt = balanced_subset(labels, len(self), seed)
        by_class = dealt[np.argsort(labels[dealt], kind="stable")]
        second = np.isin(dealt, by_class[1::2])  # every other image of a class
        return torch.from_numpy(dealt[~second]), torch.from_numpy(dealt[second])


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array; a large one lies in a file that ends with the array."""
    if math.prod(shape) <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="images-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def balanced_subset(labels: np.ndarray, count: int, seed: int, skip: int = 0) -> np.ndarray:
    """Choose ``count`` indices, the same share of each class, at random and in random order.

    Every slice of the subset, such as a batch, has as many images of each class as its length and
    the class's size allow. The subset of size ``skip`` is left out; skip + count is at most N.
    ``labels`` are int64, (N,), the result is int64, (count,).
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    # Deal the images like cards: each class at its own pace, so that all end together.
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return order[skip : skip + count]


def normalize(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], channel_order: str = "rgb"
) -> torch.Tensor:
    """Turn uint8 RGB images (N, 3, H, W) into the network's float32 input, laid out channels_last.

    The same arithmetic, in the same order, as torchvision's ``ToTensor`` and ``Normalize``.
    """
    mean, std = _on_device(mean, pixels.device), _on_device(std, pixels.device)
    images = pixels.to(torch.float32, memory_format=torch.channels_last)
    images = images.div_(255).sub_(mean).div_(std)
    if channel_order == "bgr":
        return images.flip(1).contiguous(memory_format=torch.channels_last)
    return images


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return values as (1, C, 1, 1); made once, for each copy to a GPU waits for its queue."""
    with torch.inference_mode(False):  # usable in training, whoever asks first
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
