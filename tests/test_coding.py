"""Coding a network: levels that cost little in error and bits, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS, build

from common.fitting import targets, walk
from common.network.execution import Layer
from common.network.graph import ADD
from common.network.tracing import trace_network
from pruning.channels.groups import find_groups
from pruning.channels.slimming import channels_given, slim_network
from pruning.channels.surgeon import ChannelChoice, columns_of
from quantization.coding import encoder
from quantization.coding import levels as levels_module
from quantization.coding.encoder import Original, coding_targets, layers_on_the_image
from quantization.coding.levels import choose_levels


def encode(network, images, price, original=None):
    return encoder.encode(network, coding_targets(network, images, original=original), price)


@pytest.fixture
def layer():
    """A weight (8, 36) and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 36, generator=generator)
    inputs = torch.randn(400, 36, generator=generator)
    inputs = inputs @ torch.randn(36, 36, generator=generator) + inputs
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight, moment, values):
    lost = weight - values
    return float(torch.einsum("oc,cd,od->", lost, moment, lost))


def test_carrying_errors_on_beats_rounding(layer):
    weight, moment = layer
    steps = torch.full((8,), 0.5)
    levels = choose_levels(weight, moment[None], steps, price=0.0, positions=9)
    assert levels.dtype == torch.int8
    rounded = (weight / 0.5).round() * 0.5
    assert output_error(weight, moment, levels * 0.5) < 0.7 * output_error(weight, moment, rounded)


def test_a_column_alone_is_rounded_to_the_nearest(layer):
    weight = layer[0]
    steps = torch.full((8,), 0.3)
    levels = choose_levels(weight, torch.eye(36)[None], steps, price=0.0, positions=9)
    assert torch.equal(levels.float(), (weight / 0.3).round())


def test_a_higher_price_makes_more_zeros_and_a_larger_error(layer):
    weight, moment = layer
    steps = torch.full((8,), 0.3)
    found = [choose_levels(weight, moment[None], steps, p, positions=9) for p in (0.0, 1.0, 30.0)]
    zeros = [int((levels == 0).sum()) for levels in found]
    errors = [output_error(weight, moment, levels * 0.3) for levels in found]
    assert zeros == sorted(set(zeros))
    assert errors == sorted(set(errors))


def test_errors_are_carried_on_from_block_to_block(layer, monkeypatch):
    weight, moment = layer
    found = []
    for block in (36, 9, 5):
        monkeypatch.setattr(levels_module, "BLOCK", block)
        steps = torch.full((8,), 0.5)
        found.append(choose_levels(weight, moment[None], steps, price=0.1, positions=9))
    assert all(torch.equal(levels, found[0]) for levels in found)


def test_a_level_is_the_cheapest_of_zero_and_the_two_nearest():
    """Against each level's error and bits, where a magnitude of 2 takes more bits than one of 1."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-1, 2, (9, 50), generator=generator).float().numpy()
    start[0, :3] = 2
    estimate = levels_module._Estimate(start, 9)
    estimate._row_odds[:], estimate._column_odds[:] = 0, 0
    estimate._beside = estimate._lean = 0  # whether it is zero, and its sign, take a bit each
    aims = torch.linspace(-1.9, 1.9, 50).numpy()
    stiffness, price = np.full(50, 1.5, np.float32), 0.7
    bits = {0: 1.0, 1: 2 + estimate._magnitudes[1], 2: 2 + estimate._magnitudes[2]}
    assert bits[2] - bits[1] > 2
    costs = {
        level: 1.5 * (abs(aims) - level) ** 2 + price * bits[level] for level in (0, 1, 2)
    }  # fmt: skip
    expected = np.sign(aims) * np.argmin(np.stack(list(costs.values())), axis=0)
    found = estimate.round(4, aims, stiffness, price)
    assert np.array_equal(found, expected)
    assert {0, 1} <= set(abs(found))


@pytest.fixture
def few_positions(monkeypatch):
    monkeypatch.setattr(encoder, "POSITIONS", 4)


def coded(network, layers):
    return network.with_layers({n: c.dense() for n, c in layers.items()})


@pytest.fixture(params=["resnet", *NETWORKS])
def network(request, tiny_model, random_images):
    images = random_images(64)
    model = tiny_model if request.param == "resnet" else build(request.param, images)
    return trace_network(model, images.shape)


def error_of(network, layers, images, wanted=None):
    """Return the error of the coded network's logits, as a share of those that are wanted."""
    pixels = images.normalize(images.images)
    expected = (wanted or network)(pixels)
    return float((coded(network, layers)(pixels) - expected).norm() / expected.norm())


@torch.inference_mode()
def test_at_no_price_the_network_stays_what_it_is(network, random_images, few_positions):
    images = random_images(32)
    layers = encode(network, images, price=1e-6)
    assert tuple(layers) == network.graph.layers
    assert error_of(network, layers, images) < 0.05
    for name, layer in layers.items():
        assert layer.weight.shape == network.layers[name].weight.shape
        assert torch.equal(layer.bias, layer.bias.half().float())
        assert torch.equal(layer.scales, layer.scales.half().float())


@torch.inference_mode()
def test_layers_make_up_for_what_those_before_lost(
    network, random_images, few_positions, monkeypatch
):
    images = random_images(64)

    def error():
        return error_of(network, encode(network, images, price=3.0), images)

    repaired = error()
    monkeypatch.setattr(levels_module, "REPAIR_RIDGE", 1e3)  # no repair
    assert repaired < error()


@torch.inference_mode()
def test_the_last_operand_of_a_sum_makes_up_for_the_others(random_images, few_positions):
    """The sum after a shortcut of one bit a weight is nearer than it would be."""
    images = random_images(64)
    network = trace_network(build(NETWORKS[2], images), images.shape)
    (addition,) = (o for o in network.graph.operations if o.kind == ADD)
    pixels = images.normalize(images.images)

    def error():
        found = coded(network, encode(network, images, price=3.0))
        values = (
            one.run({network.graph.input: pixels}, [addition.name])[addition.name]
            for one in (network, found)
        )
        return float(torch.sub(*values).norm())

    made_up = error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.sampling, "completed_sum", lambda network, name: (name, None))
        assert made_up < error()


def test_grouped_convolutions_are_coded_as_so_many_layers():
    """At no price, where the estimate of bits, which is all that groups share, does not count."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 18, generator=generator)
    inputs = torch.randn(3, 200, 18, generator=generator)
    inputs = inputs @ torch.randn(3, 18, 18, generator=generator)
    moments = inputs.transpose(1, 2) @ inputs / 200
    steps = torch.full((12,), 0.4)
    found = choose_levels(weight, moments, steps, price=0.0, positions=9)
    for group, rows in enumerate(torch.arange(12).split(4)):
        alone = choose_levels(weight[rows], moments[group][None], steps[rows], 0.0, positions=9)
        assert torch.equal(found[rows], alone)


def test_each_channel_of_a_depthwise_convolution_has_a_step_of_its_own(random_images):
    images = random_images(32)
    network = trace_network(build(NETWORKS[0], images), images.shape)
    layers = encode(network, images, price=0.1)
    assert len(layers["blocks.0.filter.0"].scales.unique()) > 6
    assert len(layers["blocks.0.project.0"].scales.unique()) == 1


@torch.inference_mode()
def test_a_layer_of_very_many_inputs_is_coded_in_parts(random_images, few_positions, monkeypatch):
    images = random_images(64)
    network = trace_network(build(NETWORKS[1], images), images.shape)
    whole = encode(network, images, price=1.0)
    monkeypatch.setattr(encoder.regression, "MAX_COLUMNS", 30)  # of 48, 72 and 147
    parts = encode(network, images, price=1.0)
    assert error_of(network, parts, images) < 1.5 * error_of(network, whole, images)
    assert error_of(network, encode(network, images, price=1e-6), images) < 0.05


def test_a_bit_costs_twice_as_much_where_there_are_a_quarter_of_the_weights(
    network, random_images, few_positions, monkeypatch
):
    prices, choose = {}, encoder.fit_and_choose
    monkeypatch.setattr(
        encoder,
        "fit_and_choose",
        lambda some, moments, price, *rest: (
            prices.update({some.weight.numel(): price}) or choose(some, moments, price, *rest)
        ),
    )
    encode(network, random_images(16), price=0.3)
    found = {weights: price for weights, price in prices.items() if price}
    assert len(found) > 1
    for weights, price in found.items():
        assert price == pytest.approx(0.3e-6 * (1e6 / weights) ** 0.5)


def test_fewer_images_are_used_where_memory_is_short(random_images, few_positions, monkeypatch):
    images = random_images(32)
    network = trace_network(build(NETWORKS[0], images), images.shape)
    used = []
    monkeypatch.setattr(
        targets,
        "Walk",
        lambda n, batches, *a: used.append(sum(map(len, batches))) or walk.Walk(n, batches, *a),
    )
    encode(network, images, price=0.1)
    monkeypatch.setattr(walk, "MEMORY_BYTES", 20 * 2 * walk.peak_bytes_per_image(network, 2))
    layers = encode(network, images, price=0.1)
    assert used == [64, 20]
    assert error_of(network, layers, images) < 0.5


def test_layers_that_read_the_image_directly_have_8_bits(network, random_images, few_positions):
    layers = encode(network, random_images(16), price=10.0)
    first, *others = layers.values()
    assert layers_on_the_image(network.graph) == {next(iter(layers))}
    assert (first.weight.flatten(1).abs().amax(1) >= 126).all()
    assert any((layer.weight == 0).any() for layer in others)


class Parallel(torch.nn.Module):
    """Two convolutions that read the image, one of them after a pool."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)
        self.c = torch.nn.Conv2d(8, 10, 1)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(x, 2)
        return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))


def test_several_layers_may_read_the_image():
    network = trace_network(Parallel().eval(), (3, 8, 8))
    assert layers_on_the_image(network.graph) == {"a", "b"}


@torch.inference_mode()
def test_channels_that_are_gone_are_made_up_for(network, random_images, few_positions):
    """A network without the last channel of each group, which nothing made up for."""
    images = random_images(64)
    groups, choices = find_groups(network), {}
    for name, group in groups.items():
        channels = torch.arange(group.width - 1)
        layers = {
            reader: Layer(
                network.layers[reader].weight[:, columns_of(channels, spread)],
                network.layers[reader].bias,
            )
            for reader, spread in group.readers.items()
        }
        choices[name] = ChannelChoice(channels, layers)
    slim = slim_network(network, groups, choices)

    def error(original):
        layers = encode(slim, images, price=1e-6, original=original)
        return error_of(slim, layers, images, network)

    assert error(Original(network, channels_given(groups, choices))) < 0.8 * error(None)


@torch.inference_mode()
def test_a_trained_network_is_coded_towards_the_one_that_it_was_made_from(
    tiny_model, random_images, few_positions
):
    images = random_images(64)
    dense = trace_network(tiny_model, images.shape)
    layers = dict(dense.layers)
    torch.manual_seed(0)
    inner = {n: g for n, g in find_groups(dense).items() if len(g.producers) == 1}
    for name, group in inner.items():
        order = torch.randperm(group.width)  # the same function of other channels
        layers[name] = Layer(layers[name].weight[order], layers[name].bias[order])
        for reader in group.readers:
            layers[reader] = Layer(layers[reader].weight[:, order], layers[reader].bias)
    layers["linear"] = Layer(layers["linear"].weight, layers["linear"].bias + torch.eye(10)[0])
    trained = dense.with_layers(layers)  # and it answers otherwise

    def error(original, wanted):
        return error_of(trained, encode(trained, images, 1e-6, original=original), images, wanted)

    unknown = Original(dense, dict.fromkeys(inner))
    assert error(unknown, dense) < 0.05
    assert error(None, trained) < 0.05
    own = {name: torch.arange(group.width) for name, group in inner.items()}
    assert error(Original(dense, own), dense) > 2 * error(unknown, dense)


@torch.inference_mode()
def test_layers_of_zeros_and_dead_channels_are_coded(tiny_model, random_images, few_positions):
    tiny_model.layer1[0].bn2.weight.zero_()
    tiny_model.layer2[0].bn1.weight.zero_()
    tiny_model.layer2[0].bn1.bias.fill_(-1.0)
    tiny_model.layer3[1].conv1.weight.zero_()
    images = random_images(32)
    network = trace_network(tiny_model, images.shape)
    for price in (1e-6, 0.1):
        layers = encode(network, images, price)
        assert not layers["layer3.1.conv1"].weight.any()
        assert error_of(network, layers, images) < 0.2


@torch.inference_mode()
def test_the_estimated_price_follows_the_network_and_what_is_left(random_images):
    images = random_images(64)
    dense = trace_network(build(NETWORKS[0], images), images.shape)
    price = encoder.estimate_price(dense, dense, images, 0.01)
    assert encoder.estimate_price(dense, dense, images, 0.02) == pytest.approx(2 * price)
    # Noise counts as a share of the logits' variance: half the logits, about a quarter of the nats.
    name = dense.graph.output
    last = dense.layers[name]
    calm = dense.with_layers({name: Layer(last.weight / 2, last.bias / 2)})
    assert 2.5 < encoder.estimate_price(calm, calm, images, 0.01) / price < 6
    already = error_nats(calm, dense, images)
    assert encoder.estimate_price(calm, dense, images, 2 * already) == pytest.approx(
        encoder.estimate_price(calm, calm, images, already), rel=1e-3
    )
    least = encoder.estimate_price(calm, dense, images, already / 2)
    assert least == pytest.approx(
        encoder.estimate_price(calm, calm, images, encoder.LEAST_SHARE * already / 2), rel=1e-3
    )


def error_nats(network, dense, images):
    pixels = images.normalize(images.images)
    given, wanted = (n(pixels).double().log_softmax(1) for n in (network, dense))
    return float((wanted.exp() * (wanted - given)).sum(1).mean())
