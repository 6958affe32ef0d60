"""What a source of images is: two splits of labels and pixels, and what belongs to all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.images.decoding import Sizing


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


@dataclass(frozen=True)
class SizeRequest:
    """What ``--image-size`` and ``--resize`` ask for; None leaves it to the images."""

    image_size: int | None = None
    resize: int | None = None

    def sizing(self, own: tuple[int, int]) -> Sizing:
        """Return the sizing of images whose own height and width are all the same."""
        if self.image_size is None and self.resize is None:
            return Sizing(*own)
        size = self.image_size or self.resize
        return Sizing(size, size, self.resize or size)


OWN_SIZE = SizeRequest()
