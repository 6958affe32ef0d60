"""The reference's arithmetic, against integers by hand and against FP32."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cifar import image_set
from every_kind import make_every_kind, make_images
from torch import nn

from common.network.tracing import trace_network
from quantization.int8.conversion import convert, observe
from quantization.int8.engines.reference import ReferenceRunner
from quantization.settings import Settings


@pytest.fixture(scope="module")
def network():
    return trace_network(make_every_kind(), make_images(1).shape)


@pytest.fixture(scope="module")
def observation(network):
    return observe(network, make_images(64), "minmax", 16)


@pytest.fixture(scope="module")
def images():
    images = make_images(16, seed=1)
    return images.normalize(images.images)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_a_convolution_and_a_linear_layer_by_hand():
    torch.manual_seed(0)
    network = trace_network(Two().eval(), (3, 8, 8))
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    images = image_set(pixels, torch.zeros(8, dtype=torch.int64), classes=tuple("abcde"))
    int8 = convert(observe(network, images, "minmax", 8), Settings())
    x = images.normalize(pixels)
    source, middle, last = int8.ranges["x"], int8.ranges["relu"], int8.ranges["fc"]
    levels = (x.double() / source.scale).round() + source.zero_point
    conv = int8.layers["conv"]
    steps = source.scale * conv.scales.double()
    sums = F.conv2d(
        levels.clamp(0, 255) - source.zero_point,
        conv.weight.double(),
        (conv.bias.double() / steps).round(),
        padding=1,
    )
    inner = (sums * steps.view(-1, 1, 1) / middle.scale).round() + middle.zero_point
    inner = inner.clamp(middle.zero_point, 255).flatten(1)
    fc = int8.layers["fc"]
    steps = middle.scale * fc.scales.double()
    bias = (fc.bias.double() / steps).round()
    sums = F.linear(inner - middle.zero_point, fc.weight.double(), bias)
    outer = ((sums * steps / last.scale).round() + last.zero_point).clamp(0, 255)
    expected = ((outer - last.zero_point) * last.scale).float()
    assert torch.equal(ReferenceRunner(int8)(x), expected)
    assert len(expected.unique()) > 10


@pytest.mark.parametrize(
    "fp32_layers",
    [(), ("stem",), ("classify",), ("depthwise", "excite"), ("stem", "depthwise", "hidden")],
)
def test_every_kind_answers_like_fp32(network, observation, images, fp32_layers):
    int8 = convert(observation, Settings(observer="minmax", fp32_layers=fp32_layers))
    expected, found = network(images), ReferenceRunner(int8)(images)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean() < 0.02 * expected.var()
    assert not torch.equal(found, expected)


def test_layers_in_fp32_bring_the_logits_closer(network, observation, images):
    everything = Settings(fp32_layers=network.graph.layers)
    close = ReferenceRunner(convert(observation, everything))(images)
    coarse = ReferenceRunner(convert(observation, Settings()))(images)
    expected = network(images)
    assert (close - expected).abs().mean() < 0.8 * (coarse - expected).abs().mean()


def test_nan_stays_in_its_image(observation, images):
    run = ReferenceRunner(convert(observation, Settings()))
    spoilt = images.clone()
    spoilt[3, 1, 5, 5] = float("nan")
    expected, found = run(images), run(spoilt)
    assert found[3].isnan().all()
    others = torch.arange(len(images)) != 3
    assert torch.equal(found[others], expected[others])


def test_it_can_be_copied_and_pickled(observation, images):
    run = ReferenceRunner(convert(observation, Settings()))
    expected = run(images)
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert torch.equal(other(images), expected)
