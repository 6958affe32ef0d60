"""Image files of many kinds, whole and damaged."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms

from common.command.cli import UserError
from common.images.decoding import Sizing, decode_images, read_size

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def four_bit_bmp(levels: np.ndarray, palette: np.ndarray) -> bytes:
    """What Pillow reads but does not write: ``levels`` (32, 32) below 16, ``palette`` (16, 3)."""
    rows = (levels[::-1, ::2] << 4 | levels[::-1, 1::2]).tobytes()
    colours = np.pad(palette[:, ::-1], ((0, 0), (0, 1))).tobytes()  # blue, green, red, nothing
    info = struct.pack("<3I2H6I", 40, 32, 32, 1, 4, 0, len(rows), 0, 0, 16, 0)
    start = 14 + len(info) + len(colours)
    return struct.pack("<2sI4xI", b"BM", start + len(rows), start) + info + colours + rows


COLOURS = Image.fromarray(PIXELS)
OWN = Sizing(32, 32)
LEVELS, SIXTEEN = PIXELS[..., 0] >> 4, PIXELS[0, :16]
PALETTE = COLOURS.convert("P")
IMAGE_IDS = (
    "png", "bmp", "webp", "jpeg", "grey", "one-bit", "alpha", "cmyk", "palette", "clear-palette",
    "four-bit",
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(COLOURS, "PNG"), PIXELS),
        (encoded(COLOURS, "BMP"), PIXELS),
        (encoded(COLOURS, "WEBP", lossless=True), PIXELS),
        (encoded(COLOURS, "JPEG"), None),
        (encoded(COLOURS.convert("L"), "PNG"), np.asarray(COLOURS.convert("L").convert("RGB"))),
        (encoded(COLOURS.convert("1"), "PNG"), np.asarray(COLOURS.convert("1").convert("RGB"))),
        (encoded(COLOURS.convert("RGBA"), "PNG"), PIXELS),
        (encoded(COLOURS.convert("CMYK"), "JPEG"), None),
        (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
        (encoded(PALETTE, "PNG", transparency=b"\0" * 9), np.asarray(PALETTE.convert("RGB"))),
        (four_bit_bmp(LEVELS, SIXTEEN), SIXTEEN[LEVELS]),
    ],
    ids=IMAGE_IDS,
)
def test_images_become_rgb(content, expected):
    (pixels,) = decode_images([("image", lambda: content)], 1, OWN)
    if expected is None:  # lossy: what Pillow makes of it
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))


@given(
    st.sampled_from([encoded(COLOURS, kind) for kind in ("PNG", "JPEG", "BMP", "WEBP")]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000),
)
@settings(max_examples=300)
@example(b"", [], 0)
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", [], 4000)
@example(encoded(COLOURS, "TIFF"), [], 4000)
def test_damaged_images_are_refused_or_read(content, changes, length):
    damaged = bytearray(content)
    for position, value in changes:
        if position < len(damaged):
            damaged[position] = value
    try:
        pixels = decode_images([("image", lambda: bytes(damaged[:length]))], 1, OWN)
    except UserError as error:
        message = str(error)
    else:
        message = "image: read"
        assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 32), np.uint8)
    assert message.startswith("image: ")


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (33, 100), (20, 31), (40, 40)])
@pytest.mark.parametrize(("resize", "size"), [(32, 32), (40, 32)])
def test_scaling_and_cutting_equal_torchvision(shape, resize, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
    sizing = Sizing(size, size, resize)
    (found,) = decode_images([("image", lambda: encoded(image, "PNG"))], 1, sizing)
    assert np.array_equal(found, np.asarray(reference(image)).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(orientation):
    image = Image.fromarray(PIXELS[:20])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    height, width = read_size("image", lambda: content)
    assert (width, height) == expected.size
    (found,) = decode_images([("image", lambda: content)], 1, Sizing(height, width))
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))
