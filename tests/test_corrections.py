"""Weight corrections: the function stays, what INT8 suffers from goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.images.data import normalize
from common.network.resnet import BasicBlock, fold_batch_norm
from quantization.accuracy import corrections
from quantization.accuracy.quantizers import quantize_weight


@pytest.fixture
def images(random_images):
    return normalize(random_images(16, seed=1).images)


@pytest.fixture
def uneven_model(tiny_model):
    """The tiny model with one channel 100 times its size, which the next layer takes back."""
    block = tiny_model.layer2[1]
    with torch.no_grad():
        block.bn1.weight[2] *= 100
        block.bn1.bias[2] *= 100
        block.conv2.weight[:, 2] /= 100
    return tiny_model


@torch.inference_mode()
@pytest.mark.parametrize("correct", ["absorb_batch_norm", "equalize_cross_layer"])
def test_function_is_the_same_in_fp32(uneven_model, images, correct):
    before = {name: value.clone() for name, value in uneven_model.state_dict().items()}
    expected = uneven_model(images)
    corrected = getattr(corrections, correct)(uneven_model)
    torch.testing.assert_close(corrected(images), expected, rtol=1e-4, atol=1e-4)
    assert corrected.state_dict().keys() == before.keys()
    for name, value in uneven_model.state_dict().items():
        assert torch.equal(value, before[name])


@torch.inference_mode()
def test_equalized_channels_have_equal_ranges(uneven_model):
    equalized = corrections.equalize_cross_layer(uneven_model)
    for block in (m for m in equalized.modules() if isinstance(m, BasicBlock)):
        out_ranges = block.conv1.weight.abs().amax(dim=(1, 2, 3))
        in_ranges = block.conv2.weight.abs().amax(dim=(0, 2, 3))
        torch.testing.assert_close(out_ranges, in_ranges)


@torch.inference_mode()
def test_a_dead_channel_stays_dead(tiny_model, images):
    block = tiny_model.layer1[0]
    block.bn1.weight[0] = 0.0
    equalized = corrections.equalize_cross_layer(tiny_model)
    assert torch.isfinite(equalized(images)).all()
    torch.testing.assert_close(equalized(images), tiny_model(images), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_corrected_bias_cancels_the_mean_error_of_rounding(tiny_model, random_images):
    calibration = random_images(16)
    x = normalize(calibration.images)
    plain = fold_batch_norm(tiny_model).conv1
    folded = fold_batch_norm(corrections.correct_biases(tiny_model, calibration, batch_size=8))
    rounded = quantize_weight(plain.weight)

    def mean_error(bias):
        exact = F.conv2d(x, plain.weight, plain.bias, padding=1)
        return (F.conv2d(x, rounded, bias, padding=1) - exact).mean(dim=(0, 2, 3)).abs().max()

    assert mean_error(folded.conv1.bias) < 1e-5
    assert mean_error(plain.bias) > 10 * mean_error(folded.conv1.bias)


@torch.inference_mode()
def test_each_image_counts_once_however_the_batches_fall(tiny_model, random_images):
    calibration = random_images(9)  # a batch of 8 and one of 1
    whole, uneven = (
        corrections.correct_biases(tiny_model, calibration, batch_size).state_dict()
        for batch_size in (9, 8)
    )
    for name, value in whole.items():
        torch.testing.assert_close(uneven[name], value, rtol=1e-4, atol=1e-6)
