"""Image files, from wherever they come, into pixels."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.command.cli import UserError
from common.images.data import allocate
from runtime.classify import fit

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow would also hand EPS to ghostscript


class Sizing(NamedTuple):
    """How images are brought to one size, in pixels; see :func:`runtime.classify.fit`."""

    height: int
    width: int
    # Length to which the short side is scaled before the middle is cut out; None takes images of
    # exactly this size and no others.
    short_side: int | None = None


def decode_images(
    files: Iterable[tuple[str, Callable[[], bytes]]], count: int, sizing: Sizing
) -> np.ndarray:
    """Decode images to uint8 pixels of shape (count, 3, height, width).

    ``files`` gives for each image a name to tell the user, and a function that reads its bytes.
    Grey-scale, palette and CMYK become RGB.

    Raises:
        UserError: An image is damaged, of another size, or has more than 8 bits a channel.
    """
    pixels = allocate((count, 3, sizing.height, sizing.width))
    for index, (name, read) in enumerate(files):
        with _opened(name, read) as image:
            # Pillow cuts 16-bit colours to 8 bits unasked; only the decoder's argument tells.
            if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile):
                raise UserError(f"{name}: more than 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGB")
            if sizing.short_side is None and image.size != (sizing.width, sizing.height):
                raise UserError(
                    f"{name}: {image.width}×{image.height} pixels, where others have "
                    f"{sizing.width}×{sizing.height}; --image-size brings all to one size"
                )
            pixels[index] = np.asarray(fit(image, *sizing)).transpose(2, 0, 1)
    return pixels


def resize_pixels(pixels: np.ndarray, sizing: Sizing) -> np.ndarray:
    """Bring uint8 images of shape (N, H, W, 3) to a size; return shape (N, 3, height, width)."""
    resized = allocate((len(pixels), 3, sizing.height, sizing.width))
    for index, image in enumerate(pixels):
        resized[index] = np.asarray(fit(Image.fromarray(image), *sizing)).transpose(2, 0, 1)
    return resized


def read_size(name: str, read: Callable[[], bytes]) -> tuple[int, int]:
    """Return height and width of an image, as it is shown; see :func:`decode_images`."""
    with _opened(name, read) as image:
        # The EXIF orientations from 5 on turn it. PNG's own method would decode the whole image.
        turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


@contextlib.contextmanager
def _opened(name: str, read: Callable[[], bytes]) -> Iterator[Image.Image]:
    """Open an image; whatever is wrong with it becomes one line."""
    try:
        with warnings.catch_warnings():  # Pillow's remarks on odd files that it reads all the same
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(read()), formats=IMAGE_FORMATS) as image:
                yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: no JPEG, PNG, BMP or WebP image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: far too large an image") from None
    except Exception as error:  # damaged files make Pillow fail in too many ways to list
        if isinstance(error, OSError) and error.filename:  # the file cannot be read
            raise
        raise UserError(f"{name}: a damaged image ({error})") from None
