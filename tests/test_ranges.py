"""Ranges that INT8 has to cover, against what was fed in."""

from __future__ import annotations

import pytest

from common.images.data import batches, normalize
from common.network.resnet import prunable_layers
from quantization.int8 import conversion, engines
from quantization.report.ranges import activation_ranges, weight_ranges
from quantization.settings import OBSERVERS, Settings

ENGINE = engines.candidate_engines()[0]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_kept_ranges_lie_within_what_was_seen(observer, calibrate, random_images):
    ranges = activation_ranges(calibrate(Settings(ENGINE, observer=observer)))
    pixels = normalize(random_images(32).images)
    if observer != "moving-average":
        assert ranges["input"][:2] == pytest.approx((float(pixels.min()), float(pixels.max())))
    for seen_low, seen_high, kept_low, kept_high in ranges.values():
        step = (kept_high - kept_low) / 255
        assert kept_low >= min(seen_low, 0) - 1.01 * step
        assert kept_high <= max(seen_high, 0) + 1.01 * step


@pytest.mark.parametrize("reduce_range", [False, True])
def test_kept_ranges_are_the_255_steps_that_the_kernels_have(reduce_range, calibrate):
    settings = Settings(ENGINE, reduce_range, "minmax")
    observed = calibrate(settings)
    _, _, kept_low, kept_high = activation_ranges(observed)["input"]
    scale = conversion.convert(observed, settings).conv1_input_scale_0
    assert kept_high - kept_low == pytest.approx(255 * float(scale))


def test_pooling_and_flattening_have_no_range_of_their_own(tiny_model, random_images):
    observed = conversion.calibrate(tiny_model, batches(random_images(8), 8), Settings(ENGINE))
    assert (
        len(activation_ranges(observed)) == 1 + 20 + 8 + 1
    )  # the images, convolutions, additions, the linear layer


def test_channels_spread_from_the_weakest_to_the_strongest(tiny_model):
    weight = tiny_model.layer2[0].conv2.weight.data  # 8 channels
    for channel, largest in enumerate((3, 1, 8, 2, 5, 7, 6, 4)):
        weight[channel] = 0.5
        weight[channel, 0, 1, 2] = -largest
    ranges = weight_ranges(tiny_model)
    assert list(ranges) == list(prunable_layers(tiny_model))
    assert ranges["layer2.0.conv2"] == (1.0, 4.0, 8.0)
