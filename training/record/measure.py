"""Accuracy of a trained network on held-out training images and on test images."""

from __future__ import annotations

import torch
from torch import nn

from common.command.cli import UserError
from common.images.data import ImageSet, balanced_subset
from common.measure import evaluate

HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500


def split_held_out(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into those to train on and ``count`` class-balanced held-out ones.

    Raises:
        UserError: No image would be left to train on.
    """
    if count >= len(images):
        raise UserError(f"{count} held-out images leave none of {len(images)} to train on")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[balanced_subset(images.labels.cpu().numpy(), count, HELD_OUT_SEED)] = True
    return images.rows(~held), images.rows(held)


def describe_accuracy(model: nn.Module, held_out: ImageSet, test: ImageSet) -> dict:
    """Return results.json's accuracies: held-out, test, and test by class."""
    correct, labels = find_correct(model, test), test.labels.cpu()
    by_class = {
        name: evaluate.measure_accuracy(correct[labels == label]).as_dict()
        for label, name in enumerate(test.classes)
        if (labels == label).any()
    }
    return {
        "held_out": evaluate.measure_accuracy(find_correct(model, held_out)).as_dict(),
        "accuracy": evaluate.measure_accuracy(correct).as_dict(),
        "per_class": by_class,
    }


def find_correct(model: nn.Module, images: ImageSet) -> torch.Tensor:
    """Return which images ``model``, in eval mode, classifies correctly: bool, shape (N,)."""
    return evaluate.predict(model, images, PREDICT_BATCH) == images.labels.cpu()
