"""Image files, from wherever they come, into pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.command.cli import UserError
from common.images.cifar10 import IMAGE_SIZE

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow would also hand EPS to ghostscript


def decode_images(files: Iterable[tuple[str, Callable[[], bytes]]]) -> np.ndarray:
    """Decode images to uint8 pixels of shape (n, 3, 32, 32).

    Args:
        files: A name to tell the user, and what reads the bytes, for each image.

    Raises:
        UserError: One is damaged, not 32×32, or has more than 8 bits a channel.
    """
    with warnings.catch_warnings():  # Pillow's remarks on odd files that it reads all the same
        warnings.simplefilter("ignore")
        pixels = [_decode(name, read) for name, read in files]
    return np.stack(pixels).transpose(0, 3, 1, 2).copy()


def _decode(name: str, read: Callable[[], bytes]) -> np.ndarray:
    """Decode one image to uint8 (32, 32, 3); grey-scale, palette and CMYK become RGB."""
    try:
        with Image.open(io.BytesIO(read()), formats=IMAGE_FORMATS) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):
                width, height = image.size
                raise UserError(f"{name}: {width}×{height} pixels; CIFAR-10 images are 32×32")
            # Pillow cuts 16-bit colours to 8 bits unasked; only the decoder's argument tells.
            if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile):
                raise UserError(f"{name}: more than 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: no JPEG, PNG, BMP or WebP image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: far too large for a CIFAR-10 image") from None
    except Exception as error:  # damaged files make Pillow fail in too many ways to list
        raise UserError(f"{name}: a damaged image ({error})") from None
