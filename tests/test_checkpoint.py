"""Checkpoints: the layouts that are read, where weights are looked for, and hostile bytes.

What each bad checkpoint is answered with stands in docs/bad_input.md (test_bad_input.py).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from common import checkpoint, cli
from common.checkpoint import (
    BUNDLED_WEIGHTS,
    WEIGHTS_NAME,
    find_weights,
    load_model,
    read_checkpoint,
)
from common.cli import UserError
from common.model import ResNet18

BOUNDED = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def tiny(monkeypatch, tiny_model) -> dict[str, torch.Tensor]:
    """The tiny network's weights, which the reader takes for the full-size one's here."""
    channels = (4, 8, 8, 8)
    monkeypatch.setattr(checkpoint, "ResNet18", lambda: ResNet18(stage_channels=channels))
    return tiny_model.state_dict()


def to_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        name = name.replace(".shortcut.", ".downsample.")
        renamed["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = (
            value
        )
    return renamed


def without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


LAYOUTS = {
    "canonical": lambda s: s,
    "DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled DataParallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "torchvision": to_torchvision,
    "without counters": without_counters,
    "parameters": lambda s: {
        k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {}, "lr": 0.1}},
    "model": lambda s: {"epoch": 3, "model": to_torchvision(s)},
    "net": lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 93.1, "epoch": 3},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, legacy, tiny, tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](tiny), path, _use_new_zipfile_serialization=not legacy)
    state = read_checkpoint(path)
    assert list(state) == list(tiny)
    for name, value in state.items():
        if layout == "without counters" and name.endswith("num_batches_tracked"):
            assert value == 0
        else:
            assert torch.equal(value, tiny[name])
        assert not value.requires_grad
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors"])
def test_safetensors(suffix, tiny, tmp_path):
    save_file(to_torchvision(tiny), tmp_path / f"weights{suffix}")
    state = read_checkpoint(tmp_path / f"weights{suffix}")
    assert all(torch.equal(state[name], value) for name, value in tiny.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_said(dtype, tiny, tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    path = tmp_path / "weights.pth"
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.items()}, path)
    state = read_checkpoint(path)
    for name, value in tiny.items():
        expected = value.to(dtype).float() if value.is_floating_point() else value
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], expected)
    name = str(dtype).removeprefix("torch.")
    assert capsys.readouterr().err == f"{path}: {name} weights, converted to float32\n"


def test_load_model_is_ready_to_evaluate(tiny, tiny_model, tmp_path):
    torch.save(tiny, tmp_path / "weights.pth")
    model = load_model(tmp_path / "weights.pth")
    assert not model.training
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), tiny_model(x))


def test_bundled_weights_are_readable():
    assert sum(p.numel() for p in load_model(BUNDLED_WEIGHTS).parameters()) == 11_173_962


def test_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    work, script, root = (tmp_path / name for name in ("work", "script", "root"))
    for place in (work, script, root):
        place.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(checkpoint, "REPOSITORY", root)
    assert find_weights(None, script).path == BUNDLED_WEIGHTS
    for place, words in ((root, "repository root"), (script, "script's folder"), (work, "working")):
        (place / WEIGHTS_NAME).touch()
        found = find_weights(None, script)
        assert found.path == place / WEIGHTS_NAME
        assert words in found.found
    chosen = find_weights(Path("mine.pth"), script)
    assert (chosen.path, chosen.found) == (Path("mine.pth"), "--weights mine.pth")


def test_sha256(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    described = find_weights(path, tmp_path).describe()
    assert described["sha256"] == hashlib.sha256(b"weights").hexdigest()


# --- hostile bytes: a UserError or good weights, never anything else -----------------------------


def read_bytes(folder: Path, content: bytes, suffix: str = ".pth") -> dict | None:
    """Return the weights, or None where the reader refuses them in a few words."""
    path = folder / f"weights{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read_checkpoint(path)
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
def test_a_file_cut_anywhere_is_refused(layout, tiny, tmp_path):
    content = serialized(tiny, layout)
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
def test_flipped_bits(layout, tiny, tmp_path):
    """A zip has checksums, so that nothing but unused bytes may change and be read; others not."""
    content = serialized(tiny, layout)
    suffix = ".safetensors" if layout == "safetensors" else ".pth"

    @BOUNDED
    @given(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=8, unique=True))
    def check(bits: list[int]) -> None:
        damaged = bytearray(content)
        for bit in bits:
            damaged[bit // 8] ^= 1 << bit % 8
        state = read_bytes(tmp_path, bytes(damaged), suffix)
        if state is not None and layout == "zip":
            assert all(torch.equal(state[name], value) for name, value in tiny.items())

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
        | st.dictionaries(names | st.sampled_from(checkpoint.NESTING_KEYS), inner, max_size=3)
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
def test_a_good_state_with_anything_in_it(tiny, tmp_path, changes):
    good = {k: v for k, v in tiny.items() if k not in changes}
    buffer = io.BytesIO()
    torch.save(good | changes, buffer)
    state = read_bytes(tmp_path, buffer.getvalue())
    if state is not None:
        assert all(value.shape == tiny[name].shape for name, value in state.items())
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


def test_protocols_of_pickle(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read_bytes(tmp_path, pickle.dumps({"conv1.weight": None}, protocol)) is None


# --- writing -------------------------------------------------------------------------------------


def test_a_written_checkpoint_is_what_torch_would_write(tiny, tmp_path):
    checkpoint.save_checkpoint(tiny, tmp_path / "weights.pth")
    with (tmp_path / "expected.pth").open("wb") as file:
        torch.save(tiny, file)
    assert (tmp_path / "weights.pth").read_bytes() == (tmp_path / "expected.pth").read_bytes()


def test_a_disk_that_fills_up_is_an_os_error(tiny, tmp_path):
    """A limit on file size stands in for a full disk; torch's own writer ends in RuntimeError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "weights.pth").write_text("earlier")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: 'weights\.pth'"):
            checkpoint.save_checkpoint(tiny, tmp_path / "weights.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
