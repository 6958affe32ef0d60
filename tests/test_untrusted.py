"""Hostile and damaged checkpoints: a UserError or good weights, never anything else.

What each kind of bad checkpoint is answered with stands in docs/bad_input.md (test_bad_input.py).
"""

from __future__ import annotations

import io
import pickle
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from common.checkpoints.checkpoint import load_model
from common.checkpoints.layouts import NESTING_KEYS
from common.command.cli import UserError

BOUNDED = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_bytes(folder: Path, content: bytes, suffix: str = ".pth") -> dict | None:
    """Return the weights, or None where the reader refuses them in a few words."""
    path = folder / f"weights{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return load_model(path).state_dict()
        except UserError as error:
            message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message) < len(str(path)) + 400
    return None


def serialized(state: dict[str, torch.Tensor], layout: str) -> bytes:
    if layout == "safetensors":
        return save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=layout == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(layout, tiny_state, tmp_path):
    content = serialized(tiny_state, layout)
    suffix = ".safetensors" if layout == "safetensors" else ".pth"

    @BOUNDED
    @given(st.integers(0, len(content) - 1))
    @example(0)
    @example(1)
    @example(4)
    @example(len(content) - 1)
    def check(length: int) -> None:
        assert read_bytes(tmp_path, content[:length], suffix) is None

    check()


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_flipped_bits(layout, tiny_state, tmp_path):
    """A zip has checksums, so that nothing but unused bytes may change and be read; others not."""
    content = serialized(tiny_state, layout)
    suffix = ".safetensors" if layout == "safetensors" else ".pth"

    @BOUNDED
    @given(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=8, unique=True))
    def check(bits: list[int]) -> None:
        damaged = bytearray(content)
        for bit in bits:
            damaged[bit // 8] ^= 1 << bit % 8
        state = read_bytes(tmp_path, bytes(damaged), suffix)
        if state is not None and layout == "zip":
            assert all(torch.equal(state[name], value) for name, value in tiny_state.items())

    check()


@BOUNDED
@given(st.binary(max_size=200), st.sampled_from([".pth", ".safetensors"]))
@example(b"\x80\x02cposix\nsystem\n.", ".pth")
@example(b"\x80\x02N.", ".pth")
@example(bytes(1024), ".pth")  # torch takes zeros for an empty tar archive
@example(b"PK\x03\x04", ".pth")
@example(b"\xef\xbb\xbf<html>", ".pth")
@example(b"\x02\0\0\0\0\0\0\0{}", ".safetensors")
def test_any_bytes_are_refused(tmp_path, content, suffix):
    assert read_bytes(tmp_path, content, suffix) is None


tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(4, 3, 3, 3),
        torch.zeros(10, 8),
        torch.zeros(10, 8, dtype=torch.int8),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, 3, 3, 3, dtype=torch.float8_e4m3fn),
        torch.zeros(4, 3, 3, 3).to_sparse(),
        torch.zeros(4, 3, 3, 3, device="meta"),
        torch.full((4,), float("nan")),
    ]
)
names = st.sampled_from(["conv1.weight", "linear.weight", "fc.weight", "module.conv1.weight"])
values = st.recursive(
    tensors | st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(names | st.sampled_from(NESTING_KEYS), inner, max_size=3)
        | st.dictionaries(st.integers() | st.text(max_size=3) | st.tuples(st.none()), inner)
    ),
    max_leaves=8,
)


@settings(BOUNDED, max_examples=60)
@given(values)
@example({"\x1b[2J": torch.zeros(1)})
@example({"x" * 1000: torch.zeros(1)})
@example({"state_dict": {"net": None}})
@example({"conv1.weight": torch.zeros(4, 3, 3, 3).to_sparse()})
@example({"conv1.weight": torch.zeros(4, 3, 3, 3, device="meta")})
def test_any_saved_object_is_refused(tmp_path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    assert read_bytes(tmp_path, buffer.getvalue()) is None


@settings(BOUNDED, max_examples=60)
@given(st.dictionaries(names, tensors, min_size=1, max_size=3))
@example({"conv1.weight": torch.zeros(4, 3, 3, 3).to_sparse()})
@example({"conv1.weight": torch.zeros(4, 3, 3, 3, device="meta")})
@example({"conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.float8_e4m3fn)})
@example({"module.conv1.weight": torch.zeros(4, 3, 3, 3)})
def test_a_good_state_with_anything_in_it(tiny_state, tmp_path, changes):
    good = {k: v for k, v in tiny_state.items() if k not in changes}
    buffer = io.BytesIO()
    torch.save(good | changes, buffer)
    state = read_bytes(tmp_path, buffer.getvalue())
    if state is not None:
        assert all(value.shape == tiny_state[name].shape for name, value in state.items())
        assert all(torch.isfinite(value).all() for value in state.values())


def test_a_key_of_nested_tuples_is_not_printed(tmp_path):
    """Eighteen tuples of two, each holding the one before twice, print as 262,144."""
    nested = ("a",)
    for _ in range(18):
        nested = (nested, nested)
    buffer = io.BytesIO()
    torch.save({nested: 1}, buffer)
    assert read_bytes(tmp_path, buffer.getvalue()) is None


def test_a_legacy_file_may_not_claim_huge_storages(tmp_path):
    """The older format says how large each storage is; torch must not believe it for long."""
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    size = content.rindex((64).to_bytes(8, "little"))
    claimed = content[:size] + (1 << 50).to_bytes(8, "little") + content[size + 8 :]
    assert read_bytes(tmp_path, claimed) is None


@pytest.mark.parametrize(
    "claim",
    [pickle.LONG_BINPUT + (1 << 28).to_bytes(4, "little"),
     pickle.BYTEARRAY8 + (1 << 32).to_bytes(8, "little")],
    ids=["entry of the memo", "bytes"],
)  # fmt: skip
def test_a_pickle_may_not_claim_memory(claim, tmp_path):
    """The reader of files with Python objects in them allocates nothing on their word."""
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path, b"\x80\x05cargparse\nNamespace\n" + claim + b".") is None
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_protocols_of_pickle(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read_bytes(tmp_path, pickle.dumps({"conv1.weight": None}, protocol)) is None


def test_a_safetensors_file_that_begins_like_markup_is_none(tiny_state, tmp_path):
    content = save(tiny_state)
    length = int.from_bytes(content[:8], "little")
    padded = content[8 : 8 + length].ljust(15_392)  # whose first bytes are " <"
    state = read_bytes(
        tmp_path, len(padded).to_bytes(8, "little") + padded + content[8 + length :], ".safetensors"
    )
    assert state is not None
    assert torch.equal(state["conv1.weight"], tiny_state["conv1.weight"])
