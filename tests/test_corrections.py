"""Weight corrections: the function stays, what INT8 suffers from goes."""

from __future__ import annotations

import pytest
import torch
from every_kind import make_every_kind, make_images
from torch import nn

from common.network.execution import Layer
from common.network.tracing import trace_network
from quantization.accuracy import corrections
from quantization.int8.conversion import quantize_layer


@pytest.fixture
def images(random_images):
    images = random_images(16, seed=1)
    return images.normalize(images.images)


@pytest.fixture
def uneven_network(tiny_network):
    """The tiny network with one channel 100 times its size, which the next layer takes back."""
    first, second = (tiny_network.layers[f"layer2.1.{name}"] for name in ("conv1", "conv2"))
    factor = torch.ones(len(first.bias))
    factor[2] = 100
    return tiny_network.with_layers(
        {
            "layer2.1.conv1": Layer(first.weight * factor.view(-1, 1, 1, 1), first.bias * factor),
            "layer2.1.conv2": Layer(second.weight / factor.view(-1, 1, 1), second.bias),
        }
    )


@torch.inference_mode()
def test_the_function_is_the_same_in_fp32(uneven_network, images):
    before = {name: layer.weight.clone() for name, layer in uneven_network.layers.items()}
    expected = uneven_network(images)
    equalized = corrections.equalize_cross_layer(uneven_network)
    torch.testing.assert_close(equalized(images), expected, rtol=1e-4, atol=1e-4)
    for name, layer in uneven_network.layers.items():
        assert torch.equal(layer.weight, before[name])


def test_equalized_channels_have_equal_ranges(uneven_network):
    equalized = corrections.equalize_cross_layer(uneven_network)
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)):
        first, second = (equalized.layers[f"{block}.{name}"] for name in ("conv1", "conv2"))
        torch.testing.assert_close(
            first.weight.abs().amax((1, 2, 3)), second.weight.abs().amax((0, 2, 3))
        )


@torch.inference_mode()
def test_a_dead_channel_stays_dead(tiny_network, images):
    layer = tiny_network.layers["layer1.0.conv1"]
    dead = Layer(layer.weight.clone(), layer.bias)
    dead.weight[0] = 0
    network = tiny_network.with_layers({"layer1.0.conv1": dead})
    equalized = corrections.equalize_cross_layer(network)
    torch.testing.assert_close(equalized(images), network(images), rtol=1e-4, atol=1e-4)


class Chain(nn.Module):
    """A chain through a grouped and a depthwise convolution, pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 12, 1, groups=2)
        self.c = nn.Conv2d(12, 12, 3, groups=12)
        self.d = nn.Conv2d(12, 4, 1)
        self.e = nn.Linear(4 * 4, 5)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        x = nn.functional.max_pool2d(self.d(x), 2).relu()
        return self.e(x.flatten(1))


@torch.inference_mode()
def test_chains_of_any_convolutions_are_equalized():
    torch.manual_seed(0)
    model = Chain().eval()
    for layer in (model.a, model.b, model.c, model.d):
        layer.weight.mul_(torch.rand(len(layer.weight)).mul(8).exp().view(-1, 1, 1, 1))
    network = trace_network(model, (3, 8, 8))
    pairs = corrections.equalizable_pairs(network)
    assert pairs == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]
    equalized = corrections.equalize_cross_layer(network)
    images = torch.randn(4, 3, 8, 8)
    expected = network(images)
    torch.testing.assert_close(equalized(images), expected, rtol=1e-3, atol=1e-4)

    def unevenness(layers):
        ranges = layers["c"].weight.abs().flatten(1).amax(1).log()
        return float(ranges.max() - ranges.min())

    assert unevenness(equalized.layers) < 0.7 * unevenness(network.layers)


def test_channels_that_meet_other_operations_are_left_alone():
    network = trace_network(make_every_kind(), (3, 12, 12))
    assert corrections.equalizable_pairs(network) == [("squeeze", "excite"), ("hidden", "classify")]
    equalized = corrections.equalize_cross_layer(network)
    images = make_images(8)
    batch = images.normalize(images.images)
    torch.testing.assert_close(equalized(batch), network(batch), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_corrected_bias_cancels_the_mean_error_of_rounding(tiny_network, random_images):
    calibration = random_images(16)
    x = calibration.normalize(calibration.images)
    operation, plain = tiny_network.graph["conv1"], tiny_network.layers["conv1"]
    corrected = corrections.correct_biases(tiny_network, calibration, batch_size=8)
    rounded = quantize_layer(plain).dense().weight
    exact = tiny_network.compute(operation, [x])

    def mean_error(bias):
        found = tiny_network.compute(operation, [x], layer=Layer(rounded, bias))
        return (found - exact).mean(dim=(0, 2, 3)).abs().max()

    assert mean_error(corrected.layers["conv1"].bias) < 1e-5
    assert mean_error(plain.bias) > 10 * mean_error(corrected.layers["conv1"].bias)


def test_each_image_counts_once_however_the_batches_fall(tiny_network, random_images):
    calibration = random_images(9)  # a batch of 8 and one of 1
    whole, uneven = (
        corrections.correct_biases(tiny_network, calibration, batch_size).layers
        for batch_size in (9, 8)
    )
    for name, layer in whole.items():
        torch.testing.assert_close(uneven[name].bias, layer.bias, rtol=1e-4, atol=1e-6)
