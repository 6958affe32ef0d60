"""Sparse weights as two streams: what is in them, and that nothing else is accepted."""

from __future__ import annotations

import lzma
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.weight_coding import decode, encode

VALUES = {
    torch.int8: st.integers(-128, 127) | st.just(0),
    torch.float32: st.sampled_from([0.0, -0.0, 1.5, -2.25, 1e-40, 3e38]),
}


@st.composite
def weights(draw):
    dtype = draw(st.sampled_from(list(VALUES)))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    count = math.prod(shape)
    values = draw(st.lists(VALUES[dtype], min_size=count, max_size=count))
    return torch.tensor(values, dtype=dtype).reshape(shape)


@given(st.lists(weights(), min_size=1, max_size=4))
def test_every_bit_comes_back(original):
    decoded = decode(*encode(original), original)
    assert [w.shape for w in decoded] == [w.shape for w in original]
    assert [w.dtype for w in decoded] == [w.dtype for w in original]
    assert [w.numpy().tobytes() for w in decoded] == [w.numpy().tobytes() for w in original]


def test_streams_are_what_the_format_says():
    first = torch.tensor([[0, 5, 0], [-7, 0, 0]], dtype=torch.int8)
    second = torch.tensor([0.0, -0.0, 2.0])  # -0.0 is 80 00 00 00, 2.0 is 40 00 00 00
    bits, values = encode([first, second])
    assert lzma.decompress(bits) == bytes([0b010100_01, 0b1_0000000])
    expected = bytes([5, 256 - 7]) + bytes([0, 0, 0, 0, 0, 0, 0x80, 0x40])
    assert lzma.decompress(values) == expected


WEIGHTS = [torch.tensor([0, 1, 2, 0], dtype=torch.int8)]


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: lzma.compress(b""),
        lambda content: lzma.compress(lzma.decompress(content) + b"\x00"),
        lambda content: lzma.compress(bytes(1 << 24)),
        lambda content: b"\x80\x04N.",  # a pickle
    ],
)
def test_other_streams_are_refused(stream, change):
    streams = list(encode(WEIGHTS))
    streams[stream] = change(streams[stream])
    with pytest.raises((ValueError, lzma.LZMAError)):
        decode(*streams, WEIGHTS)


def test_more_memory_than_a_file_of_ours_needs_is_refused():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 512 << 20}]
    _, values = encode(WEIGHTS)
    with pytest.raises(lzma.LZMAError, match=r"[Mm]emory"):
        decode(lzma.compress(b"\x60", filters=filters), values, WEIGHTS)
