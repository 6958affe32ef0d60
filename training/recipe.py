"""What a training run does, as plain values.

Nothing here imports torch, so that the command line can show the defaults at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The settings that decide what is learned; seed and images aside.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step, over all processes together.
        learning_rate: Peak of the schedule.
        warmup: Fraction of all steps in which the learning rate rises.
        optimizer: ``sgd``, with Nesterov's momentum, or ``adam``.
        momentum: Of SGD.
        weight_decay: On weights only: biases and batch-norm tensors are left alone.
        label_smoothing: Probability spread over all classes.
        crop_padding: Largest shift of a random crop, in pixels.
        flip: Mirror half of the images.
        cutmix: Fraction of images of which a square shows another image of the batch.
        jitter: Fraction of images that are turned, scaled and sheared a little, and of those whose
            colours change.
        hold_statistics: Batch norms go on normalising by the statistics that they came with.
        precision: Of convolutions and products: ``fp32`` or ``bf16`` (autocast).
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


# Made the bundled weights: three such runs at once on one H100 took 8.5 minutes.
BUNDLED_RECIPE = Recipe(epochs=150, batch_size=512, learning_rate=0.4, cutmix=0.5, jitter=0.5)
