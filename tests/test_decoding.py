"""Image files of many kinds, whole and damaged."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.command.cli import UserError
from common.images.decoding import decode_images

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
    (pixels,) = decode_images([("image", lambda: content)])
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
        pixels = decode_images([("image", lambda: bytes(damaged[:length]))])
    except UserError as error:
        message = str(error)
    else:
        message = "image: read"
        assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 32), np.uint8)
    assert message.startswith("image: ")
