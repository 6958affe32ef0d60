"""INT8 conversion, checked against integer arithmetic done by hand."""

from __future__ import annotations

import contextlib
import copy
import gc
from dataclasses import replace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.fx import GraphModule

from common import cli
from common.cli import UserError
from common.data import batches, normalize
from quantization import engines
from quantization.engines import Settings

ENGINES = engines.candidate_engines()


@pytest.fixture
def observed(tiny_model, random_images):
    return engines.calibrate(tiny_model, batches(random_images(32), 16), Settings())


@pytest.fixture
def images(random_images):
    return normalize(random_images(16, seed=1).images)


@torch.inference_mode()
def test_first_convolution_is_integer_arithmetic(observed, images):
    converted = engines.convert(observed, Settings(ENGINES[0]))
    layer = converted.get_submodule("conv1")
    scale = converted.conv1_input_scale_0.item()
    zero_point = converted.conv1_input_zero_point_0.item()
    quantized = torch.quantize_per_tensor(images, scale, zero_point, torch.quint8)
    weight = layer.weight()
    steps = scale * weight.q_per_channel_scales()
    sums = F.conv2d(
        quantized.int_repr().double() - zero_point,
        weight.int_repr().double(),
        (layer.bias().double() / steps).round(),
        padding=1,
    )
    exact = sums * (steps / layer.scale).view(1, -1, 1, 1) + layer.zero_point
    wanted = exact.round().clamp(layer.zero_point, 255)  # the ReLU is fused
    got = layer(quantized).int_repr().double()
    is_tie = (exact - exact.floor() - 0.5).abs() < 1e-3  # FP32 may round it either way
    assert torch.equal(got[~is_tie], wanted[~is_tie])
    assert is_tie.double().mean() < 0.02


@pytest.mark.parametrize("engine", ENGINES)
@torch.inference_mode()
def test_logits_are_close_to_fp32(engine, tiny_model, observed, images):
    expected = tiny_model(images)
    got = engines.convert(observed, Settings(engine))(images)
    noise = (got - expected).square().mean() / expected.square().mean()
    assert noise < 0.01  # 20 dB
    assert not torch.equal(got, expected)


def test_biases_are_multiples_of_the_steps_of_the_sums(observed):
    converted = engines.convert(observed, Settings(ENGINES[0]))
    scales = {"conv1": converted.conv1_input_scale_0.item()}
    scales["layer1.0.conv1"] = converted.get_submodule("conv1").scale
    scales["layer1.0.conv2"] = converted.get_submodule("layer1.0.conv1").scale
    for name, scale in scales.items():
        layer = converted.get_submodule(name)
        multiples = layer.bias().double() / (scale * layer.weight().q_per_channel_scales())
        assert torch.allclose(multiples, multiples.round(), rtol=0, atol=0.01), name
        assert multiples.abs().max() > 10, name


def test_conversion_leaves_the_calibrated_model_as_it_is(observed):
    before = copy.deepcopy(observed.state_dict())
    engines.convert(observed, Settings(ENGINES[0]))
    after = observed.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_every_operation_is_int8(observed):
    operations = engines.list_operations(engines.convert(observed, Settings(ENGINES[0])))
    assert all(operation.is_int8 for operation in operations)
    # 20 convolutions, 8 additions, pooling, flattening, the linear layer.
    assert len(operations) == 31


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv2", "layer2.0.shortcut.0", "linear"])
def test_layers_left_in_fp32_and_no_others(layer, tiny_model, random_images, images):
    settings = Settings(ENGINES[0], fp32_layers=(layer,))
    observed = engines.calibrate(tiny_model, batches(random_images(32), 16), settings)
    converted = engines.convert(observed, settings)
    floating = [op.name for op in engines.list_operations(converted) if not op.is_int8]
    assert floating == [layer]


def test_a_layer_that_stayed_fp32_unasked_is_an_error(tiny_model, random_images):
    settings = Settings(ENGINES[0], fp32_layers=("layer1.0.conv2",))
    observed = engines.calibrate(tiny_model, batches(random_images(8), 8), settings)
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv2"):
        engines.convert(observed, replace(settings, fp32_layers=()))


def test_reduced_range_uses_seven_bits(tiny_model, random_images):
    loader = batches(random_images(32), 16)
    scales = []
    for reduce_range in (False, True):
        settings = Settings(ENGINES[0], reduce_range, "minmax")
        converted = engines.convert(engines.calibrate(tiny_model, loader, settings), settings)
        scales.append(converted.conv1_input_scale_0.item())
    assert scales[1] / scales[0] == pytest.approx(255 / 127, rel=1e-3)


@pytest.mark.parametrize("observer", engines.OBSERVERS)
def test_kept_ranges_lie_within_what_was_seen(observer, tiny_model, random_images):
    settings = Settings(ENGINES[0], observer=observer)
    observed = engines.calibrate(tiny_model, batches(random_images(32), 16), settings)
    ranges = engines.activation_ranges(observed)
    assert ranges[0].name == "input"
    pixels = normalize(random_images(32).images)
    if observer != "moving-average":
        assert ranges[0].seen_min == pytest.approx(float(pixels.min()))
        assert ranges[0].seen_max == pytest.approx(float(pixels.max()))
    for kept in ranges:
        step = (kept.kept_max - kept.kept_min) / 255
        assert kept.kept_min >= min(kept.seen_min, 0) - 1.01 * step
        assert kept.kept_max <= max(kept.seen_max, 0) + 1.01 * step


def test_an_engine_that_is_not_here_is_named_with_those_that_are():
    with pytest.raises(UserError, match=rf"no abacus engine .* it has: .*{ENGINES[0]}"):
        engines.choose_settings("abacus")


def test_candidates_are_supported_and_qnnpack_only_alone():
    supported = torch.backends.quantized.supported_engines
    assert ENGINES
    assert set(ENGINES) <= set(supported)
    assert "qnnpack" not in ENGINES or len(ENGINES) == 1


def test_the_engine_is_restored_even_after_a_failure():
    before = torch.backends.quantized.engine
    with contextlib.suppress(KeyError), engines.quiet_torch(ENGINES[-1]):
        assert torch.backends.quantized.engine == ENGINES[-1]
        raise KeyError
    assert torch.backends.quantized.engine == before


def test_conversions_leave_no_models_behind(tiny_model, random_images):
    """torch.ao keeps what it meets in a cache; 21 layers' worth of that were gigabytes."""
    settings = Settings(ENGINES[0])
    observed = engines.calibrate(tiny_model, batches(random_images(8), 8), settings)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), GraphModule) for thing in gc.get_objects())

    engines.convert(observed, settings)
    before = alive()
    for _ in range(3):
        exempt = replace(settings, fp32_layers=("conv1",))
        engines.convert(engines.reuse_ranges(observed, tiny_model, exempt), exempt)
    assert alive() == before


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    scale=st.floats(2**-13, 1024, width=32),
    zero_point=st.integers(0, 127),
    quant_max=st.sampled_from([127, 255]),
    seed=st.integers(0, 1000),
)
def test_rounding_is_torchs_own(scale, zero_point, quant_max, seed):
    x = 200 * scale * torch.randn(500, generator=torch.Generator().manual_seed(seed))
    rounded = engines.Quantizer(scale, zero_point, 0, quant_max)(x)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, quant_max)
    assert torch.equal(rounded, expected)


@pytest.mark.parametrize(
    ("supported", "expected"),
    [(["none", "qnnpack"], "qnnpack"), (["qnnpack", "onednn"], "qnnpack"), (["onednn"], "onednn"),
     (["qnnpack", "fbgemm", "x86"], "fbgemm")],
)  # fmt: skip
def test_where_there_is_no_fbgemm_one_line_says_what_is_used(
    supported, expected, monkeypatch, capsys
):
    cli.set_up_messages(quiet=False)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", supported)
    assert engines.default_engines() == [expected]
    assert capsys.readouterr().err.count("\n") == (expected != "fbgemm")
