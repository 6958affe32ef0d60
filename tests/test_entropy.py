"""The coder of levels: what was written comes back, in few bits, on every machine alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.files import entropy
from runtime.decode import LEVELS, decode_levels, log2_eighths

# Levels of five layers as an earlier version wrote them. Contexts are integers, so every machine
# must read the same levels from it; a changed context would break all files already written.
STREAM = Path(__file__).with_name("fixtures") / "levels.bin"
SHAPES = [(16, 3, 9), (24, 16, 9), (32, 24, 1), (10, 64, 1), (12, 12, 25)]
SHA256 = "73180fd42836da2d76f3724a0e61708d55dc4cea7617452759e431a519a3413f"


def round_trip(layers, change=lambda stream: stream):
    stored = [(entropy.choose_storage(layer), layer.shape) for layer in layers]
    return decode_levels(change(entropy.encode(layers)), stored)


def test_streams_already_written_stay_readable():
    stream = np.frombuffer(STREAM.read_bytes(), np.uint8)
    levels = decode_levels(stream, [("sparse", shape) for shape in SHAPES])
    assert hashlib.sha256(b"".join(layer.tobytes() for layer in levels)).hexdigest() == SHA256
    assert max(int(np.abs(layer).max()) for layer in levels) == 81


@given(st.integers(1, 1 << 40))
def test_logarithms_are_exact(number):
    assert log2_eighths(number) == (number**8).bit_length() - 1


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 4, 9, 25])).flatmap(
            lambda shape: arrays.arrays(np.int8, shape, elements=st.integers(-128, 127))
        ),
        max_size=3,
    )
)
def test_levels_come_back(layers):
    for old, new in zip(layers, round_trip(layers), strict=True):
        assert np.array_equal(old, new)


def test_a_layer_of_zeros_comes_back_from_next_to_nothing():
    (levels,) = round_trip([np.zeros((512, 1024, 1), np.int8)])
    assert not levels.any()


@pytest.mark.parametrize("spread", [3, 90])
def test_dense_levels_come_back_near_their_entropy(spread):
    rng = np.random.default_rng(0)
    layers = [
        np.clip(np.round(rng.normal(size=shape) * spread), -128, 127).astype(np.int8)
        for shape in ((128, 64, 9), (300, 300, 1))
    ]
    assert [entropy.choose_storage(layer) for layer in layers] == ["dense", "dense"]
    for old, new in zip(layers, round_trip(layers), strict=True):
        assert np.array_equal(old, new)
    bits = 0.0
    for levels in layers:
        shares = np.unique(levels, return_counts=True)[1] / levels.size
        bits -= levels.size * float(shares @ np.log2(shares))
    assert len(entropy.encode(layers)) - len(layers) * 2 * LEVELS < 1.001 * bits / 8 + 16


def test_a_dense_layer_of_one_level_comes_back():
    layer = np.full((1000, 70, 1), 5, np.int8)
    assert entropy.choose_storage(layer) == "dense"
    assert np.array_equal(round_trip([layer])[0], layer)


def test_a_layer_too_small_for_its_table_and_one_of_many_zeros_are_sparse():
    levels = np.ones((entropy.MIN_DENSE_WEIGHTS // 4, 4, 1), np.int8)
    assert entropy.choose_storage(levels) == "dense"
    assert entropy.choose_storage(levels[1:]) == "sparse"
    levels[: len(levels) // 2 + 1] = 0
    assert entropy.choose_storage(levels) == "sparse"


@pytest.mark.parametrize("size", [40, 400])  # a sparse and a dense layer
@pytest.mark.parametrize(
    "change", [lambda s: s[:20], lambda s: s[:-1], lambda s: np.append(s, np.zeros(400, np.uint8))]
)
def test_streams_of_another_length_are_refused(change, size):
    levels = np.random.default_rng(0).integers(-5, 6, (size, size, 1)).astype(np.int8)
    with pytest.raises(ValueError, match="coded levels"):
        round_trip([levels], change)


def test_a_dense_layer_without_levels_is_refused():
    with pytest.raises(ValueError, match="without levels"):
        decode_levels(np.zeros(2 * LEVELS + 4, np.uint8), [("dense", (1, 1))])
