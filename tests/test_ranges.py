"""Ranges that INT8 has to cover, against what was fed in."""

from __future__ import annotations

import pytest

from common.network.execution import Layer
from quantization.report.plots import activation_ranges, weight_ranges
from quantization.settings import OBSERVERS, Settings


@pytest.mark.parametrize("observer", OBSERVERS)
def test_kept_ranges_lie_within_what_was_seen(observer, observe, random_images):
    ranges = activation_ranges(observe(Settings(observer=observer)), reduce_range=False)
    images = random_images(32)
    pixels = images.normalize(images.images)
    if observer != "moving-average":
        assert ranges["input"][:2] == pytest.approx((float(pixels.min()), float(pixels.max())))
    for seen_low, seen_high, kept_low, kept_high in ranges.values():
        step = (kept_high - kept_low) / 255
        assert kept_low >= min(seen_low, 0) - 1.01 * step
        assert kept_high <= max(seen_high, 0) + 1.01 * step


@pytest.mark.parametrize("reduce_range", [False, True])
def test_kept_ranges_are_the_255_steps_that_the_kernels_have(reduce_range, observe):
    observation = observe(Settings(observer="minmax"))
    _, _, kept_low, kept_high = activation_ranges(observation, reduce_range)["input"]
    scale = observation.ranges(reduce_range)["x"].scale
    assert kept_high - kept_low == pytest.approx(255 * scale)


def test_pooling_and_flattening_have_no_range_of_their_own(observe):
    found = activation_ranges(observe(Settings()), reduce_range=False)
    assert len(found) == 1 + 20 + 8 + 1  # the images, convolutions, additions, the linear layer
    assert {"input", "conv1", "layer4.1.conv2", "linear"} <= found.keys()


def test_channels_spread_from_the_weakest_to_the_strongest(tiny_network):
    layer = tiny_network.layers["layer2.0.conv2"]  # 8 channels
    weight = layer.weight.clone()
    for channel, largest in enumerate((3, 1, 8, 2, 5, 7, 6, 4)):
        weight[channel] = 0.5
        weight[channel, 0, 1, 2] = -largest
    network = tiny_network.with_layers({"layer2.0.conv2": Layer(weight, layer.bias)})
    ranges = weight_ranges(network)
    assert list(ranges) == list(network.graph.layers)
    assert ranges["layer2.0.conv2"] == (1.0, 4.0, 8.0)
