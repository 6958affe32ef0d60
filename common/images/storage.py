"""Memory for images: what does not fit lies in a temporary file that is mapped into memory."""

import math
import tempfile

import numpy as np

MAX_BYTES_IN_MEMORY = 1 << 30  # 7,000 images of 224×224


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array; a large one lies in a file that ends with the array."""
    if math.prod(shape) <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="images-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
