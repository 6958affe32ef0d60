"""What a training run does, as plain values: the recipe and the two presets.

Nothing here imports torch, so that the command line can show the presets at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.cifar10 import IMAGE_SIZE

SIZE_STEP = 4  # of progressive resizing, in pixels


@dataclass(frozen=True)
class Recipe:
    """The settings that decide what is learned; seed and images aside.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step, over all processes together.
        learning_rate: Peak of the schedule.
        schedule: ``cosine`` (short warm-up, then cosine to zero) or ``one-cycle`` (linear up, then
            linear down to zero).
        warmup: Fraction of all steps in which the learning rate rises.
        momentum: Nesterov's.
        weight_decay: On weights only: biases and batch-norm tensors are left alone.
        label_smoothing: Probability spread over all classes.
        crop_padding: Largest shift of a random crop, in pixels of a 32-pixel image.
        flip: Mirror half of the images.
        cutout: Side of the hidden square, in pixels of a 32-pixel image; 0 hides nothing.
        cutmix: Fraction of images of which a square shows another image of the batch.
        jitter: Fraction of images that are turned, scaled and sheared a little, and of those whose
            colours change.
        start_size: Side to which images are shrunk at first, in pixels.
        full_size_from: Fraction of the epochs after which images have their full size.
        ema_decay: Of the weights' exponential moving average, a step.
        precision: Of convolutions and products: ``fp32``, ``bf16`` or ``fp16`` (autocast);
            ``auto`` takes what the device is fast in.
        compile: Compile the network with ``torch.compile``.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0
    cutmix: float = 0.0
    jitter: float = 0.0
    start_size: int = IMAGE_SIZE
    full_size_from: float = 0.0
    ema_decay: float = 0.998
    precision: str = "auto"
    compile: bool = False

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate once ``progress`` (0 to 1) of all steps are done.

        Cosine: Loshchilov and Hutter, 2017 (https://arxiv.org/abs/1608.03983), without restarts;
        one-cycle: Smith and Topin, 2018 (https://arxiv.org/abs/1708.07120).
        """
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        left = (1 - progress) / (1 - self.warmup) if self.warmup < 1 else 0.0
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
        return self.learning_rate * left

    def image_size_at(self, epoch: int) -> int:
        """Return the side in pixels of the images of ``epoch`` (from 0).

        Small images are cheap and teach the coarse features first (Howard, 2018; Tan and Le, 2021,
        https://arxiv.org/abs/2104.00298).
        """
        full_size_epochs = self.full_size_from * self.epochs
        if epoch >= full_size_epochs:
            return IMAGE_SIZE
        grown = (IMAGE_SIZE - self.start_size) * epoch / full_size_epochs
        return self.start_size + int(grown / SIZE_STEP) * SIZE_STEP


PRESETS = {
    # Made the bundled weights: three such runs at once on one H100 took 8.5 minutes.
    "gpu": Recipe(epochs=150, batch_size=512, learning_rate=0.4, cutmix=0.5, jitter=0.5),
    # Too few epochs to overfit, so little augmentation; small images at first, for speed. On two
    # Zen 5 cores 52 minutes; the model card says what it reached.
    "cpu": Recipe(
        epochs=14,
        batch_size=128,
        learning_rate=0.2,
        schedule="one-cycle",
        warmup=0.2,
        start_size=16,
        full_size_from=0.8,
        ema_decay=0.99,
    ),
}
