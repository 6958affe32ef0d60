"""From FP32 to INT8: weights, biases and ranges, against torch.ao and arithmetic by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_kind import make_every_kind, make_images

from common.network.execution import Layer
from common.network.tracing import trace_network
from quantization.int8 import conversion
from quantization.int8.conversion import convert, convert_coded, observe, quantize_layer
from quantization.int8.engines.reference import ReferenceRunner
from quantization.int8.observers import MinMaxObserver
from quantization.settings import OBSERVERS, Settings

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def network():
    return trace_network(make_every_kind(), make_images(1).shape)


@pytest.fixture(scope="module")
def observation(network):
    return observe(network, make_images(32), "minmax", 16)


def test_torch_ao_is_imported_nowhere():
    folders = ("common", "quantization", "pruning", "pipeline", "training", "benchmarks")
    sources = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    importing = re.compile(r"^ *(from|import) torch\.(ao|quantization)\b", re.MULTILINE)
    assert not [p for p in sources if importing.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (8, 1, 5, 5), (5, 12)])
def test_weights_are_those_of_torchs_per_channel_quantization(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    layer = quantize_layer(Layer(weight, torch.zeros(shape[0])))
    zero_points = torch.zeros(shape[0], dtype=torch.int64)
    expected = torch.quantize_per_channel(weight, layer.scales, zero_points, 0, torch.qint8)
    assert torch.equal(layer.weight, expected.int_repr())
    torch.testing.assert_close(layer.scales[1:], weight.abs().flatten(1).amax(1)[1:] / 127.5)
    assert (layer.weight[0] == 0).all()
    assert layer.dense().weight.sub(weight).abs().max() <= 0.51 * layer.scales.max()


def test_values_are_observed_as_fp32_has_them(network, observation):
    images = make_images(32)
    first = images.normalize(images.images)
    names = [name for name, x in observation.observers.items() if type(x) is MinMaxObserver]
    values = network.run({network.graph.input: first}, names)
    for name in ("x", "relu6", "hardswish", "add", "classify"):
        observer = observation.observers[name]
        assert observer.low <= float(values[name].min()) + 1e-6, name
        assert observer.high >= float(values[name].max()) - 1e-6, name


def test_moved_values_share_the_range_of_what_was_moved(observation):
    ranges = observation.ranges(reduce_range=False)
    assert ranges["adaptive"] == ranges["flatten"]
    assert ranges["max_pool2d"] == ranges["mul"]
    assert ranges["cat"] != ranges["mul"]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_a_network_that_answers_like_fp32(network, observer):
    images = make_images(32, seed=1)
    batch = images.normalize(images.images)
    observed = observe(network, make_images(32), observer, 16)
    found = ReferenceRunner(convert(observed, Settings(observer=observer)))(batch)
    expected = network(batch)
    assert (found - expected).square().mean() < 0.05 * expected.square().mean()


def test_reduced_range_uses_seven_bits(observation):
    full, reduced = (observation.ranges(reduce)["x"].scale for reduce in (False, True))
    assert reduced / full == pytest.approx(255 / 127, rel=1e-3)


def test_one_observation_serves_every_choice_of_fp32_layers(observation):
    plain = convert(observation, Settings())
    mixed = convert(observation, Settings(fp32_layers=("stem", "hidden")))
    in_fp32 = {name for name in mixed.graph.layers if not mixed.layers[name].is_int8}
    assert in_fp32 == {"stem", "hidden"}
    assert mixed.ranges.items() <= plain.ranges.items()
    assert torch.equal(mixed.layers["squeeze"].weight, plain.layers["squeeze"].weight)


def test_facts_of_the_images_are_kept(observation):
    int8, images = convert(observation, Settings()), make_images(1)
    assert (int8.classes, int8.mean, int8.std) == (images.classes, images.mean, images.std)


def test_a_bias_too_large_for_int32_widens_the_scale_of_its_channel(network):
    layer = network.layers["squeeze"]
    weight, bias = layer.weight.clone(), layer.bias.clone()
    weight[1], bias[1] = 1e-9, 50.0
    changed = network.with_layers({"squeeze": Layer(weight, bias)})
    int8 = convert(observe(changed, make_images(16), "minmax", 16), Settings())
    source = int8.ranges[changed.graph["squeeze"].inputs[0]].scale
    levels = int8.layers["squeeze"].bias_levels(source)
    assert levels.abs().max() <= conversion.MAX_BIAS_LEVEL * 1.001
    assert levels[1] * source * int8.layers["squeeze"].scales[1] == pytest.approx(50.0, rel=1e-6)


def test_coded_layers_keep_their_levels_and_are_observed_as_coded(network):
    coded = {name: quantize_layer(network.layers[name]) for name in network.graph.layers}
    half = replace(coded["stem"], scales=coded["stem"].scales / 2)
    int8 = convert_coded(network, {**coded, "stem": half}, make_images(16), Settings(), 16)
    assert torch.equal(int8.layers["stem"].weight, coded["stem"].weight)
    assert torch.equal(int8.layers["stem"].scales, half.scales)
    plain = convert_coded(network, coded, make_images(16), Settings(), 16)
    assert int8.ranges["relu6"].scale < plain.ranges["relu6"].scale
