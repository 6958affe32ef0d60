"""Settings of a training run; without torch, so that ``--help`` answers at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings that decide what is learned, apart from seed and images."""

    epochs: int
    batch_size: int  # images in a step, over all processes together
    learning_rate: float  # peak of the schedule
    warmup: float = 0.05  # fraction of all steps in which the learning rate rises
    optimizer: str = "sgd"  # with Nesterov's momentum, or adam
    momentum: float = 0.9
    weight_decay: float = 5e-4  # biases and batch-norm tensors do not decay
    label_smoothing: float = 0.1  # probability spread over all classes
    crop_padding: int = 4  # largest shift of a random crop, in pixels
    flip: bool = True  # mirror half of the images
    cutmix: float = 0.0  # fraction of images of which a square shows another image of the batch
    jitter: float = 0.0  # fraction of images that are distorted, and of images that are recoloured
    hold_statistics: bool = False  # batch norms keep their statistics and normalise by them
    precision: str = "fp32"  # or bf16 (autocast)

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
