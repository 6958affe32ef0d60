"""INT8's rounding in FP32, against torch's own and against a converted model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.images.data import normalize
from common.network.resnet import fold_batch_norm, prunable_layers
from quantization.accuracy.quantizers import Quantizer, layer_quantizers, quantize_weight
from quantization.int8 import conversion, engines
from quantization.settings import Settings

SETTINGS = Settings(engines.candidate_engines()[0])


@pytest.fixture
def observed(calibrate):
    return calibrate(SETTINGS)


@settings(max_examples=50)
@given(
    scale=st.floats(2**-13, 1024, width=32),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 1000),
)
def test_rounding_is_torchs_own(scale, zero_point, seed):
    x = 200 * scale * torch.randn(500, generator=torch.Generator().manual_seed(seed))
    rounded = Quantizer(scale, zero_point)(x)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    assert torch.equal(rounded, expected)


def test_layers_read_and_write_on_the_grids_of_the_converted_model(tiny_model, observed):
    converted = conversion.convert(observed, SETTINGS)
    quantizers = layer_quantizers(observed)
    assert list(quantizers) == list(prunable_layers(tiny_model))
    for name, (_, write) in quantizers.items():
        layer = converted.get_submodule(name)
        assert write.scale == pytest.approx(layer.scale), name
        assert write.zero_point == layer.zero_point, name
    read, _ = quantizers["conv1"]
    assert read.scale == pytest.approx(converted.conv1_input_scale_0.item())
    assert quantizers["layer1.0.conv2"][0] == quantizers["layer1.0.conv1"][1]


@pytest.mark.exact_sums
@pytest.mark.parametrize("engine", engines.candidate_engines())
@torch.inference_mode()
def test_in_seven_bits_the_kernels_reach_level_255_and_so_does_what_simulates_them(
    tiny_model, random_images, engine
):
    settings = Settings(engine, reduce_range=True, observer="minmax")
    dim, bright = normalize(random_images(32).images) / 3, normalize(random_images(8).images)
    observed = conversion.calibrate(tiny_model, [(dim, None)], settings)
    converted, (read, write) = (
        conversion.convert(observed, settings),
        layer_quantizers(observed)["conv1"],
    )
    with engines.quiet_torch(engine):
        image = torch.quantize_per_tensor(bright, read.scale, read.zero_point, torch.quint8)
        output = converted.conv1(image)
    assert int(image.int_repr().max()) > 127
    assert int(output.int_repr().max()) > 127
    assert torch.equal(read(bright), image.dequantize())
    layer = converted.conv1
    simulated = write(
        F.conv2d(read(bright), layer.weight().dequantize(), layer.bias(), padding=1).relu_()
    )
    assert (simulated - output.dequantize()).abs().max() <= 1.01 * write.scale


def test_rounded_weights_are_those_of_the_converted_model(tiny_model, observed):
    converted = conversion.convert(observed, SETTINGS)
    for name, layer in prunable_layers(fold_batch_norm(tiny_model)).items():
        expected = converted.get_submodule(name).weight().dequantize()
        assert torch.allclose(quantize_weight(layer.weight), expected, rtol=0, atol=1e-6), name
