"""INT8 models as files: whole, checked, and loaded for the engine that they were made for."""

from __future__ import annotations

import pytest
import torch

import quantization
from common.command import cli
from common.command.cli import UserError
from common.files.untrusted import read_sealed, write_sealed
from common.images.data import normalize
from common.machine import device
from common.network.coded import SUFFIX, save_coded
from quantization.coding import kernels
from quantization.files import artifact
from quantization.int8 import deploy, engines
from quantization.settings import Settings

ENGINES = engines.candidate_engines()
ALL_ENGINES = sorted({*torch.backends.quantized.supported_engines} - {"none"})


@pytest.fixture
def images(random_images):
    return normalize(random_images(8, seed=1).images)


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize(
    "fp32_layers", [(), ("layer1.0.conv2", "linear"), ("conv1", "layer2.0.conv1")]
)
@torch.inference_mode()
def test_a_reloaded_model_computes_bit_for_bit_the_same(
    convert, images, tmp_path, engine, fp32_layers
):
    settings = Settings(engine, observer="minmax", fp32_layers=fp32_layers)
    converted = convert(settings)
    path = tmp_path / "model.pth"
    assert artifact.save_int8(converted, settings, path) == path.stat().st_size
    expected = deploy.Deployed(converted, engine)(images)
    assert torch.equal(artifact.load_int8(path)(images), expected)


@pytest.mark.skipif(not deploy.CAN_FREEZE, reason="this Python has no TorchScript")
@pytest.mark.parametrize("engine", ALL_ENGINES)
@torch.inference_mode()
def test_a_frozen_model_brings_its_engine(convert, images, tmp_path, engine):
    converted = convert(Settings(engine))
    expected = deploy.Deployed(converted, engine)(images)
    path = tmp_path / f"model{artifact.FROZEN_SUFFIX}"
    assert artifact.save_frozen(converted, engine, path) == path.stat().st_size
    others = {*torch.backends.quantized.supported_engines} - {engine, "none"}
    torch.backends.quantized.engine = min(others, default=engine)
    assert torch.equal(artifact.load_frozen(path)(images), expected)
    assert torch.backends.quantized.engine == engine


@pytest.mark.parametrize("load", [artifact.load_int8, artifact.load_frozen])
@pytest.mark.parametrize(
    "content", [None, b"", b"PK\x03\x04 nothing", b"<!DOCTYPE html>", b"\x80\x02}q\x00."]
)
def test_bad_files_are_refused_by_name(tmp_path, load, content):
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pth: "):
        load(path)


def test_a_plain_checkpoint_is_refused(tmp_path, tiny_model):
    path = tmp_path / "fp32.pth"
    torch.save(tiny_model.state_dict(), path)
    with pytest.raises(UserError, match="not a file of the kind resnet18-cifar10-int8"):
        artifact.load_int8(path)
    with pytest.raises(UserError, match="no frozen INT8 model"):
        artifact.load_frozen(path)


def test_a_truncated_file_is_refused(convert, tmp_path):
    settings = Settings(ENGINES[0])
    path = tmp_path / "model.pth"
    artifact.save_int8(convert(settings), settings, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.pth: .*damaged"):
        artifact.load_int8(path)


@pytest.mark.skipif("fbgemm" not in ENGINES, reason="no fbgemm engine on this CPU")
@pytest.mark.parametrize(("vnni", "reduce_range"), [(False, False), (False, True), (True, False)])
def test_full_range_without_vnni_is_warned_of(
    convert, tmp_path, monkeypatch, capsys, vnni, reduce_range
):
    settings = Settings("fbgemm", reduce_range)
    path = tmp_path / "model.pth"
    artifact.save_int8(convert(settings), settings, path)
    monkeypatch.setattr(device, "has_vnni", lambda: vnni)
    cli.set_up_messages(quiet=True)
    artifact.load_int8(path)
    warned = "no VNNI" in capsys.readouterr().err
    assert warned == (not vnni and not reduce_range)


@pytest.mark.parametrize(
    "forged",
    [
        {"settings": {"engine": "abacus"}},
        {"settings": None},
        {"settings": {"colour": "red"}},
        {"state_dict": None},
        {"state_dict": {"conv1.weight": 3}},
    ],
)
def test_forged_content_is_refused_in_one_line(convert, tmp_path, forged):
    settings, path = Settings(ENGINES[0]), tmp_path / "forged.pth"
    artifact.save_int8(convert(settings), settings, path)
    with engines.quiet_torch():
        write_sealed(read_sealed(path, artifact.FORMAT) | forged, artifact.FORMAT, path)
    with pytest.raises(UserError, match=r"forged\.pth: damaged or no INT8 model") as caught:
        artifact.load_int8(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("conv1.scale", lambda t: t * float("nan")),
        ("conv1.scale", torch.zeros_like),
        ("layer1_0_relu2_scale_0", lambda t: -t),
        ("conv1.zero_point", lambda t: t + 300),
        ("conv1.bias", lambda t: t * float("inf")),
        ("conv1.bias", lambda t: t[:-1]),
        ("conv1.bias", lambda t: t.long()),
        ("layer1.0.conv2.weight", lambda t: t[:, :-1]),
        ("layer1.0.conv2.weight", torch.Tensor.dequantize),
        ("layer1.0.conv2.weight", lambda t: rescaled(t, -1.0)),
        ("layer1.0.conv2.weight", lambda t: rescaled(t, float("nan"))),
        ("linear._packed_params._packed_params", lambda pair: (rescaled(pair[0], 0.0), pair[1])),
        ("linear._packed_params._packed_params", lambda pair: pair[:1]),
        ("linear._packed_params._packed_params", lambda pair: 3),
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused_in_one_line(convert, tmp_path, name, forge):
    settings, path = Settings(ENGINES[0]), tmp_path / "forged.pth"
    artifact.save_int8(convert(settings), settings, path)
    with engines.quiet_torch():
        content = read_sealed(path, artifact.FORMAT)
        content["state_dict"][name] = forge(content["state_dict"][name])
        write_sealed(content, artifact.FORMAT, path)
    with pytest.raises(UserError, match=r"forged\.pth: damaged or no INT8 model") as caught:
        artifact.load_int8(path)
    assert "\n" not in str(caught.value)


def test_a_small_file_of_a_wide_network_is_refused_before_it_is_built(convert, tmp_path):
    settings, path = Settings(ENGINES[0]), tmp_path / "wide.pth"
    artifact.save_int8(convert(settings), settings, path)
    with engines.quiet_torch():
        content = read_sealed(path, artifact.FORMAT)
        for name in content["state_dict"]:
            if name.endswith(("conv1.weight", "conv2.weight")):
                content["state_dict"][name] = torch.zeros(1, dtype=torch.int8).expand(1024, 1, 1, 1)
        write_sealed(content, artifact.FORMAT, path)
    with pytest.raises(UserError, match="fewer bytes than weights"):
        artifact.load_int8(path)


@pytest.mark.parametrize("coded_file", [False, True])
@torch.inference_mode()
def test_loading_draws_no_random_numbers_and_nan_stays_nan(convert, images, tmp_path, coded_file):
    settings = Settings(ENGINES[0])
    converted, path = convert(settings), tmp_path / "model.pth"
    if coded_file:
        path = path.with_suffix(SUFFIX)
        save_coded(kernels.from_int8(converted, settings), path)
    else:
        artifact.save_int8(converted, settings, path)
    before = torch.get_rng_state()
    model = artifact.load_int8(path)
    assert torch.equal(torch.get_rng_state(), before)
    expected = model(images)
    images[2, 0, 5, 5], images[4, 2, 0, 0] = float("nan"), float("-inf")
    found = model(images=images)
    assert found[[2, 4]].isnan().all()
    found[[2, 4]] = expected[[2, 4]]
    assert torch.equal(found, expected)


def rescaled(weight, factor):
    return torch._make_per_channel_quantized_tensor(
        weight.int_repr(), weight.q_per_channel_scales() * factor,
        weight.q_per_channel_zero_points(), axis=0,
    )  # fmt: skip


def test_flipped_bytes_are_found(convert, tmp_path):
    settings, path = Settings(ENGINES[0]), tmp_path / "model.pth"
    artifact.save_int8(convert(settings), settings, path)
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 3, len(content) // 2, 97):
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pth: .*damaged"):
        artifact.load_int8(path)


def test_the_package_hands_on_its_reader():
    assert quantization.load_int8 is artifact.load_int8
    with pytest.raises(AttributeError):
        quantization.load_int4  # noqa: B018


def test_from_python_a_refusal_is_a_value_error_of_one_line(tmp_path):
    for name in ("nothing.pth", "nothing.safetensors"):
        with pytest.raises(ValueError, match=r"\A[^\n]*no such file\Z"):
            quantization.load_int8(tmp_path / name)
