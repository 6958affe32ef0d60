"""Coding a network: levels that cost little in error and bits, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch

from common.command.cli import UserError
from common.images.data import normalize
from common.network.coded import CodedNetwork
from common.network.resnet import BLOCKS, ResNet18, fold_batch_norm, prunable_layers
from pruning.channels.slimming import slim_by_norm
from quantization.coding import encoder
from quantization.coding.encoder import Original, encode
from quantization.coding.levels import choose_levels


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
    levels = choose_levels(weight, moment, steps, price=0.0, positions=9)
    assert levels.dtype == torch.int8
    rounded = (weight / 0.5).round() * 0.5
    assert output_error(weight, moment, levels * 0.5) < 0.7 * output_error(weight, moment, rounded)


def test_a_column_alone_is_rounded_to_the_nearest(layer):
    weight = layer[0]
    levels = choose_levels(weight, torch.eye(36), torch.full((8,), 0.3), price=0.0, positions=9)
    assert torch.equal(levels.float(), (weight / 0.3).round())


def test_a_higher_price_makes_more_zeros_and_a_larger_error(layer):
    weight, moment = layer
    steps = torch.full((8,), 0.3)
    found = [choose_levels(weight, moment, steps, p, positions=9) for p in (0.0, 1.0, 30.0)]
    zeros = [int((levels == 0).sum()) for levels in found]
    errors = [output_error(weight, moment, levels * 0.3) for levels in found]
    assert zeros == sorted(set(zeros))
    assert errors == sorted(set(errors))


@pytest.fixture
def few_positions(monkeypatch):
    monkeypatch.setattr(encoder, "POSITIONS", 4)


def coded(model, layers):
    network = ResNet18(model.widths).eval()
    network.load_state_dict(CodedNetwork(layers, torch.empty(0), torch.empty(0), {}).state_dict())
    return network


@torch.inference_mode()
def test_at_no_price_the_network_stays_what_it_is(tiny_model, random_images, few_positions):
    images = random_images(32)
    layers = encode(fold_batch_norm(tiny_model), images, price=1e-6)
    assert list(layers) == list(prunable_layers(tiny_model))
    expected, logits = (
        m(normalize(images.images)) for m in (tiny_model, coded(tiny_model, layers))
    )
    assert (logits - expected).norm() < 0.05 * expected.norm()


@torch.inference_mode()
def test_layers_make_up_for_what_those_before_lost(
    tiny_model, random_images, few_positions, monkeypatch
):
    images = random_images(64)
    normalized = normalize(images.images)
    expected = tiny_model(normalized)

    def error():
        layers = encode(fold_batch_norm(tiny_model), images, price=3.0)
        return float((coded(tiny_model, layers)(normalized) - expected).norm())

    repaired = error()
    monkeypatch.setattr(encoder, "REPAIR_RIDGE", 1e3)  # no repair
    assert repaired < error()


@torch.inference_mode()
def test_channels_that_are_gone_are_made_up_for(tiny_model, random_images, few_positions):
    images = random_images(64)
    widths = {name: width - 1 for name, width in zip(BLOCKS, tiny_model.widths.inner, strict=True)}
    slim = fold_batch_norm(slim_by_norm(tiny_model, widths))
    dense = fold_batch_norm(tiny_model)
    channels = {}
    for name in BLOCKS:
        of_slim, of_dense = (n.get_submodule(name).conv1.weight for n in (slim, dense))
        same = (of_slim[:, None] == of_dense).flatten(2).all(2)
        channels[name] = same.int().argmax(1)
    normalized = normalize(images.images)

    def error(original):
        layers = encode(slim, images, price=1e-6, original=original)
        return float((coded(slim, layers)(normalized) - tiny_model(normalized)).norm())

    assert error(Original(dense, channels)) < 0.8 * error(None)


@torch.inference_mode()
def test_a_trained_network_is_coded_towards_the_one_that_it_was_made_from(
    tiny_model, random_images, few_positions
):
    images = random_images(64)
    pixels = normalize(images.images)
    dense = fold_batch_norm(tiny_model)
    trained = copy.deepcopy(dense)
    torch.manual_seed(0)
    for name in BLOCKS:
        block = trained.get_submodule(name)
        order = torch.randperm(block.conv1.out_channels)  # the same function of other channels
        block.conv1.weight.copy_(block.conv1.weight[order])
        block.conv1.bias.copy_(block.conv1.bias[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
    trained.linear.bias[0] += 1.0  # and it answers otherwise

    def error(original, wanted):
        layers = encode(trained, images, price=1e-6, original=original)
        logits = coded(trained, layers)(pixels)
        return float((logits - wanted(pixels)).norm() / wanted(pixels).norm())

    assert error(Original(dense, None), dense) < 0.05
    assert error(None, trained) < 0.05
    own = {name: torch.arange(c) for name, c in zip(BLOCKS, dense.widths.inner, strict=True)}
    assert error(Original(dense, own), dense) > 2 * error(Original(dense, None), dense)


def test_activations_beyond_fp16_are_told(tiny_model, random_images):
    tiny_model.bn1.weight.data *= 1e6
    with pytest.raises(UserError, match="beyond 65,504"):
        encode(fold_batch_norm(tiny_model), random_images(8), 0.02)
