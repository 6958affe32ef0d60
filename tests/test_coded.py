"""Coded networks: the very same INT8 model comes back, and no other file is believed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from common.command.cli import UserError
from common.files import entropy
from common.images.data import batches, normalize
from common.network import coded
from common.network.checkpoint import load_model
from common.network.resnet import fold_batch_norm, prunable_layers
from quantization.coding import kernels
from quantization.coding.reference import ReferenceNetwork
from quantization.files import artifact
from quantization.int8 import conversion, deploy, engines
from quantization.settings import Settings

ENGINES = engines.candidate_engines()
PLAIN = Settings(ENGINES[0], observer="minmax")


@pytest.fixture
def convert(pruned_model, random_images):
    def make(how):
        observed = conversion.calibrate(pruned_model, batches(random_images(32), 16), how)
        return conversion.convert(observed, how)

    return make


@pytest.fixture
def saved(convert, tmp_path):
    path = tmp_path / "model.safetensors"
    coded.save_coded(kernels.from_int8(convert(PLAIN), PLAIN), path)
    return path


def rewrite(path, change, checksum=True):
    """Write the file anew with its tensors and metadata changed, as a forger would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    if checksum:
        metadata["sha256"] = coded._checksum(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("spread", [0.3, 3, 90])
def test_levels_come_back(spread):
    rng, shapes = np.random.default_rng(0), [(5, 7, 9), (3, 9, 1), (1, 1, 1), (2, 3, 4)]
    layers = [
        np.clip(np.round(rng.normal(size=shape) * spread), -128, 127).astype(np.int8)
        for shape in shapes
    ]
    for old, new in zip(layers, entropy.decode(entropy.encode(layers), shapes), strict=True):
        assert np.array_equal(old, new)


def test_structure_makes_the_stream_short():
    """Channels of zeros and kernels of one sign cost less than the same levels in disorder."""
    rng = np.random.default_rng(0)
    kernels_ = rng.choice([-1, 0, 0, 0, 0, 1], size=(64, 64, 1)) * np.ones((1, 1, 9), int)
    levels = (kernels_ * (rng.random(kernels_.shape) < 0.8)).astype(np.int8)
    disorder = rng.permutation(levels.ravel()).reshape(levels.shape)
    assert len(entropy.encode([levels])) < 0.5 * len(entropy.encode([disorder]))


@pytest.mark.parametrize("change", [lambda s: s[:20], lambda s: s[:-1], lambda s: s + bytes(400)])
def test_streams_of_another_length_are_refused(change):
    levels = np.random.default_rng(0).integers(-5, 6, (8, 8, 9)).astype(np.int8)
    with pytest.raises(ValueError, match="coded levels"):
        entropy.decode(change(entropy.encode([levels])), [levels.shape])


@pytest.mark.parametrize(
    ("engine", "fp32_layers"),
    [(ENGINES[0], ("conv1", "layer1.0.conv2", "linear")), (ENGINES[-1], ())],
)
@torch.inference_mode()
def test_the_very_same_model_comes_back(convert, random_images, tmp_path, engine, fp32_layers):
    how = Settings(engine, observer="minmax", fp32_layers=fp32_layers)
    converted = convert(how)
    path = tmp_path / "model.safetensors"
    size_bytes = coded.save_coded(kernels.from_int8(converted, how), path)
    assert size_bytes == path.stat().st_size
    images = normalize(random_images(8, seed=1).images)
    expected = deploy.Deployed(converted, engine)(images)
    assert torch.equal(artifact.load_int8(path)(images), expected)


@pytest.mark.exact_sums
@torch.inference_mode()
def test_the_reference_computes_what_the_kernels_compute(convert, random_images, tmp_path):
    network = kernels.from_int8(convert(PLAIN), PLAIN)
    images = normalize(random_images(32, seed=1).images)
    kernel_logits = deploy.Deployed(kernels.to_int8(network)[0], PLAIN.engine)(images)
    reference_logits = ReferenceNetwork(network)(images)
    steps = (kernel_logits - reference_logits).abs() / network.activation_scales[-1]
    assert steps.max() < 3
    assert steps.mean() < 0.1
    assert reference_logits.std() > 10 * network.activation_scales[-1]


@torch.inference_mode()
def test_a_file_of_another_machine_runs_on_the_engine_that_is_here(
    saved, random_images, monkeypatch
):
    images = normalize(random_images(8, seed=1).images)
    expected = artifact.load_int8(saved)(images)
    path = saved.with_name("elsewhere.safetensors")
    path.write_bytes(saved.read_bytes())
    rewrite(path, _set_settings(engine="qnnpack"))
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", PLAIN.engine])
    assert torch.equal(artifact.load_int8(path)(images), expected)


@pytest.mark.parametrize("engine", sorted({*torch.backends.quantized.supported_engines} - {"none"}))
def test_an_engine_that_is_here_is_kept_though_no_run_would_choose_it(saved, monkeypatch, engine):
    path = saved.with_name("asked_for.safetensors")
    path.write_bytes(saved.read_bytes())
    rewrite(path, _set_settings(engine=engine))
    chosen = []
    monkeypatch.setattr(
        artifact.deploy, "Deployed", lambda model, engine: chosen.append(engine) or model
    )
    artifact.load_int8(path)
    assert chosen == [engine]  # qnnpack on x86: verified bit by bit after saving


def test_without_kernels_the_reference_is_loaded(saved, monkeypatch):
    monkeypatch.setattr(engines, "candidate_engines", list)
    assert isinstance(artifact.load_int8(saved), ReferenceNetwork)


@torch.inference_mode()
def test_its_fp32_values_are_a_checkpoint(pruned_model, convert, random_images, saved):
    model, converted = load_model(saved), convert(PLAIN)
    for name, layer in prunable_layers(fold_batch_norm(model)).items():
        module = converted.get_submodule(name)
        assert torch.equal(layer.weight, module.weight().dequantize()), name
        assert torch.allclose(layer.bias, module.bias(), rtol=0, atol=1e-6), name
    images = normalize(random_images(8, seed=1).images)
    torch.testing.assert_close(model(images), pruned_model(images), rtol=0.1, atol=0.1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_or_damaged_file_is_refused_in_one_line(saved, tmp_path, data):
    content = bytearray(saved.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.safetensors: ") as refused:
        artifact.load_int8(path)
    assert "\n" not in str(refused.value)


def _scramble(tensors, _):
    tensors["levels"] = torch.randint(0, 256, tensors["levels"].shape, dtype=torch.uint8)


def _set_settings(**fields):
    def change(tensors, metadata):
        metadata["settings"] = json.dumps(json.loads(metadata["settings"]) | fields)

    return change


FORGERIES = [
    (lambda t, m: t.update(levels=torch.zeros(4, dtype=torch.uint8)), "cut off"),
    (lambda t, m: t.update(levels=torch.zeros(1 << 20, dtype=torch.uint8)), "coded levels"),
    (lambda t, m: t.update(levels=t["levels"].float()), "levels has another"),
    (_scramble, "damaged"),
    (lambda t, m: t.pop("biases"), "biases"),
    (lambda t, m: t.update(evil=torch.zeros(1)), "evil is missing or unexpected"),
    (lambda t, m: t.update(biases=torch.zeros(9)), "another shape"),
    (lambda t, m: t["biases"].fill_(float("nan")), "NaN"),
    (lambda t, m: t["scales"].fill_(float("nan")), "NaN"),
    (lambda t, m: t["scales"].neg_(), "not positive"),
    (lambda t, m: t["scale_runs"].mul_(1 << 20), "not as many"),
    (lambda t, m: t["scale_runs"].neg_(), "not positive"),
    (lambda t, m: t["activation_scales"].neg_(), "not positive"),
    (lambda t, m: t.update(activation_scales=torch.ones(())), "another shape"),
    (
        lambda t, m: t.update(
            activation_scales=torch.ones(()), activation_zero_points=torch.zeros(()).byte()
        ),
        "activation_scales has another shape",
    ),
    (
        lambda t, m: t.update(scales=torch.ones(2), scale_runs=torch.ones(2, 8).int()),
        "scales has another shape",
    ),
    (
        lambda t, m: t.update(scales=torch.ones(1), scale_runs=torch.ones(()).int()),
        "scale_runs has another shape",
    ),
    (
        lambda t, m: t.update(
            activation_scales=torch.ones(3),
            activation_zero_points=torch.zeros(3, dtype=torch.uint8),
        ),
        "damaged or no INT8 model",
    ),
    (lambda t, m: m.update(format="else"), "without its mark"),
    (lambda t, m: m.update(version="9"), "version 9"),
    (lambda t, m: m.update(settings="{"), "damaged"),
    (lambda t, m: m.update(settings="[" * 100_000), "damaged"),
    (lambda t, m: m.update(settings="{}"), "damaged or no INT8 model"),
    (lambda t, m: m.update(widths="[[64, 128, 256, 1e9], []]"), "widths"),
    (lambda t, m: m.update(widths="[[1024, 1024, 1024, 1024], []]"), "too few for 1"),
    (lambda t, m: m.update(fp32_layers='["conv9"]'), "FP32 layers"),
    (lambda t, m: m.update(fp32_layers='["linear"]'), "fp32_weights"),
    (_set_settings(engine="no"), "no INT8 model is made with"),
    (_set_settings(engine=["fbgemm"]), "no INT8 model is made with"),
    (_set_settings(fp32_layers=["conv9"]), "no INT8 model is made with"),
    (_set_settings(fp32_layers=["conv1"]), "other layers are in FP32"),
]


def test_forged_files_are_refused_in_one_line(saved, tmp_path):
    path = tmp_path / "forged.safetensors"
    for change, message in FORGERIES:
        path.write_bytes(saved.read_bytes())
        rewrite(path, change)
        with pytest.raises(UserError, match=message) as refused:
            artifact.load_int8(path)
        assert "\n" not in str(refused.value)


def test_a_checksum_that_differs_is_told(saved):
    rewrite(saved, lambda t, m: t["biases"].add_(1), checksum=False)
    with pytest.raises(UserError, match="checksum differs"):
        artifact.load_int8(saved)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x80\x02}q\x00.", b"<!DOCTYPE html>", b"PK\x03\x04"]
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors: "):
        artifact.load_int8(path)
