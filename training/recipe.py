"""Settings of a training run.

This module does not import torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings that decide what is learned, apart from seed and images.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step, over all processes together.
        learning_rate: Peak of the schedule.
        warmup: Fraction of all steps in which the learning rate rises.
        optimizer: ``sgd``, with Nesterov's momentum, or ``adam``.
        momentum: Momentum of SGD.
        weight_decay: Decay of weights; biases and batch-norm tensors do not decay.
        label_smoothing: Probability spread over all classes.
        crop_padding: Largest shift of a random crop, in pixels.
        flip: Whether half of the images are mirrored.
        cutmix: Fraction of images of which a square shows another image of the batch.
        jitter: Fraction of images that are rotated, scaled and sheared a little, and of images
            whose colours change.
        hold_statistics: Whether batch norms keep their statistics and normalise by them.
        precision: Precision of convolutions and products: ``fp32`` or ``bf16`` (autocast).
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 4
    flip: bool = True
    cutmix: float = 0.0
    jitter: float = 0.0
    hold_statistics: bool = False
    precision: str = "fp32"

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate once ``progress`` (0 to 1) of all steps are done.

        It rises linearly, then falls to zero along a cosine (Loshchilov and Hutter, 2017,
        https://arxiv.org/abs/1608.03983, without restarts).
        """
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        left = (1 - progress) / (1 - self.warmup) if self.warmup < 1 else 0.0
        return self.learning_rate * 0.5 * (1 - math.cos(math.pi * left))


# The recipe of the bundled weights. Three such runs at once on one H100 took 8.5 minutes.
BUNDLED_RECIPE = Recipe(epochs=150, batch_size=512, learning_rate=0.4, cutmix=0.5, jitter=0.5)
