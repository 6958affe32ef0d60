"""Packed INT8 models: the same model comes back, and no other file is believed."""

from __future__ import annotations

import json
import lzma

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from common.cli import UserError
from common.data import batches, normalize
from quantization import artifact, conversion, deploy, engines, packing
from quantization.settings import Settings

pytestmark = pytest.mark.usefixtures("tiny_skeleton")
ENGINES = engines.candidate_engines()
PLAIN = Settings(ENGINES[0], observer="minmax")
MIXED = Settings(ENGINES[0], observer="minmax", fp32_layers=("layer1.0.conv2", "linear"))


@pytest.fixture
def convert(pruned_model, random_images):
    def make(how):
        observed = conversion.calibrate(pruned_model, batches(random_images(32), 16), how)
        return conversion.convert(observed, how)

    return make


@pytest.fixture
def packed(convert, tmp_path):
    path = tmp_path / "model.safetensors"
    packing.save_packed(convert(PLAIN), PLAIN, path)
    return path


def rewrite(path, change, checksum=True):
    """Write the file anew with its tensors and metadata changed, as a forger would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    if checksum:
        metadata["sha256"] = packing._checksum(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fp32_layers", [(), ("layer1.0.conv2", "linear")])
@torch.inference_mode()
def test_the_very_same_model_comes_back(convert, random_images, tmp_path, engine, fp32_layers):
    how = Settings(engine, observer="minmax", fp32_layers=fp32_layers)
    converted = convert(how)
    path = tmp_path / "model.safetensors"
    assert packing.save_packed(converted, how, path) == path.stat().st_size
    reloaded, read = packing.load_packed(path)
    assert read == how
    state = reloaded.state_dict()
    assert state.keys() == converted.state_dict().keys()
    for name, old in converted.state_dict().items():
        is_pair = isinstance(old, tuple)
        for a, b in zip(old, state[name], strict=True) if is_pair else [(old, state[name])]:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    images = normalize(random_images(8, seed=1).images)
    expected = deploy.flatten(converted, engine)(images)
    assert torch.equal(artifact.load_int8(path)(images), expected)


def test_zeros_make_the_file_small(convert, tmp_path):
    converted = convert(PLAIN)
    plain, packed = tmp_path / "model.pth", tmp_path / "model.safetensors"
    artifact.save_int8(converted, PLAIN, plain)
    packing.save_packed(converted, PLAIN, packed)
    assert packed.stat().st_size < plain.stat().st_size


def test_weights_with_a_zero_point_are_refused():
    weight = torch.quantize_per_channel(
        torch.ones(2, 2), torch.ones(2), torch.tensor([0, 1]), 0, torch.qint8
    )
    with pytest.raises(ValueError, match="symmetrically"):
        packing.pack({"weight": weight})


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_truncated_or_damaged_file_is_refused_in_one_line(packed, tmp_path, data):
    content = bytearray(packed.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.safetensors: ") as refused:
        packing.load_packed(path)
    assert "\n" not in str(refused.value)


BOMB = torch.frombuffer(bytearray(lzma.compress(bytes(1 << 26))), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.update({packing.BITS: BOMB}), "not as many"),
        (lambda t, m: t.update({packing.VALUES: BOMB}), "not as many"),
        (lambda t, m: t.update({packing.VALUES: BOMB.float()}), "holds no bytes"),
        (lambda t, m: t.pop("conv1.scale"), "conv1.scale is missing"),
        (lambda t, m: t.update(evil=torch.zeros(1)), "evil is missing or unexpected"),
        (lambda t, m: t.update({"conv1.bias": torch.zeros(9)}), "another shape"),
        (lambda t, m: t["conv1.bias"].fill_(float("nan")), "NaN"),
        (lambda t, m: t["conv1.weight.scales"].neg_(), "not positive"),
        (lambda t, m: t["conv1.zero_point"].fill_(300), "outside of 0 to 255"),
        (lambda t, m: m.update(format="else"), "no packed INT8 model"),
        (lambda t, m: m.update(settings="{"), "damaged"),
        (lambda t, m: m.update(settings="[" * 100_000), "damaged"),
        (lambda t, m: m.update(settings='{"engine": "x"}'), "incomplete or unknown"),
    ],
)
def test_forged_files_are_refused(packed, change, message):
    rewrite(packed, change)
    with pytest.raises(UserError, match=message) as refused:
        packing.load_packed(packed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine", "no"), ("observer", ["x"]), ("reduce_range", 1), ("fp32_layers", ["conv9"])],
)
def test_forged_settings_are_refused(packed, field, value):
    def change(tensors, metadata):
        metadata["settings"] = json.dumps(json.loads(metadata["settings"]) | {field: value})

    rewrite(packed, change)
    with pytest.raises(UserError, match="no INT8 model is made with"):
        packing.load_packed(packed)


def test_a_checksum_that_differs_is_told(packed):
    rewrite(packed, lambda t, m: t["conv1.bias"].add_(1), checksum=False)
    with pytest.raises(UserError, match="checksum differs"):
        packing.load_packed(packed)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x80\x02}q\x00.", b"<!DOCTYPE html>", b"PK\x03\x04"]
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors: "):
        artifact.load_int8(path)
