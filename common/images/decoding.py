"""Image files, from wherever they come, into pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.command.cli import UserError
from common.images.storage import allocate
from runtime.classify import fit

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow would also hand EPS to ghostscript


@dataclass(frozen=True)
class Sizing:
    """How images are brought to one size.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        short_side: Length to which the short side is scaled before the middle is cut out; None
            takes images of exactly this size and no others.
    """

    height: int
    width: int
    short_side: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image scaled and cut, as torchvision's Resize and CenterCrop do it."""
        if self.short_side is None:
            return image
        return fit(image, self.height, self.width, self.short_side)


def decode_images(
    files: Iterable[tuple[str, Callable[[], bytes]]], count: int, sizing: Sizing
) -> np.ndarray:
    """Decode images to uint8 pixels of shape (count, 3, height, width).

    Args:
        files: For each image a name to tell the user, and a function that reads its bytes.
        count: Number of images.
        sizing: Size of the result.

    Raises:
        UserError: An image is damaged, of another size, or has more than 8 bits a channel.
    """
    pixels = allocate((count, 3, sizing.height, sizing.width))
    with warnings.catch_warnings():  # Pillow's remarks on odd files that it reads all the same
        warnings.simplefilter("ignore")
        for index, (name, read) in enumerate(files):
            pixels[index] = _decode(name, read, sizing).transpose(2, 0, 1)
    return pixels


def resize_pixels(pixels: np.ndarray, sizing: Sizing) -> np.ndarray:
    """Bring uint8 images of shape (N, H, W, 3) to a size; return shape (N, 3, height, width)."""
    resized = allocate((len(pixels), 3, sizing.height, sizing.width))
    for index, image in enumerate(pixels):
        resized[index] = np.asarray(sizing.apply(Image.fromarray(image))).transpose(2, 0, 1)
    return resized


def read_size(name: str, read: Callable[[], bytes]) -> tuple[int, int]:
    """Return height and width of an image, as it is shown; see :func:`decode_images`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = _with_image(name, read, _size_as_shown)
    return height, width


def _decode(name: str, read: Callable[[], bytes], sizing: Sizing) -> np.ndarray:
    """Decode one image to uint8 (H, W, 3); grey-scale, palette and CMYK become RGB."""

    def convert(image: Image.Image) -> np.ndarray:
        # Pillow cuts 16-bit colours to 8 bits unasked; only the decoder's argument tells.
        if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile):
            raise UserError(f"{name}: more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGB")
        if sizing.short_side is None and image.size != (sizing.width, sizing.height):
            raise UserError(
                f"{name}: {image.width}×{image.height} pixels, where others have {sizing.width}×"
                f"{sizing.height}; --image-size brings all to one size"
            )
        return np.asarray(sizing.apply(image))

    return _with_image(name, read, convert)


def _size_as_shown(image: Image.Image) -> tuple[int, int]:
    """Return width and height; the EXIF orientations from 5 on turn the image on its side."""
    # PNG's own method would decode the whole image.
    width, height = image.size
    turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _with_image(name: str, read: Callable[[], bytes], use: Callable) -> object:
    try:
        with Image.open(io.BytesIO(read()), formats=IMAGE_FORMATS) as image:
            return use(image)
    except (UserError, OSError) as error:
        if isinstance(error, UserError) or error.filename:  # the latter: the file cannot be read
            raise
        if isinstance(error, UnidentifiedImageError):
            raise UserError(f"{name}: no JPEG, PNG, BMP or WebP image") from None
        raise UserError(f"{name}: a damaged image ({error})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: far too large an image") from None
    except Exception as error:  # damaged files make Pillow fail in too many ways to list
        raise UserError(f"{name}: a damaged image ({error})") from None
