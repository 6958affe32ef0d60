"""Images with the facts of CIFAR-10: its classes, mean and std."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.images import data
from common.images.cifar import CLASSES
from common.images.data import ImageSet
from common.images.loading import Source, Split
from common.images.normalisation import MEAN, STD


def image_set(images: torch.Tensor, labels: torch.Tensor, **facts: object) -> ImageSet:
    """Make a dataset; ``facts`` replace those of CIFAR-10."""
    return ImageSet(images, labels, **{"classes": CLASSES, "mean": MEAN, "std": STD} | facts)


def source(open_split: Callable[[str], Split], classes: tuple[str, ...] = CLASSES) -> Source:
    """Make a source of image folders."""
    return Source("folder", "a test", open_split, classes, MEAN, STD)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 images."""
    return data.normalize(pixels, MEAN, STD)
