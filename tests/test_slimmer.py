"""Slim networks by share: of the multiply-adds, or of the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.network.resnet import BLOCKS, ResNet18, Widths
from common.network.size import describe_layers
from common.network.tracing import trace_network
from pruning.channels import slimmer as module
from pruning.channels.slimmer import MACS, WEIGHTS, Slimmer


def cost_of(model, unit):
    layers = describe_layers(model, trace_network(model.eval(), (3, 32, 32)))
    return sum(getattr(layer, unit) for layer in layers)


@pytest.fixture
def slimmer(tiny_model, random_images):
    return Slimmer(tiny_model, random_images(40).images, 0, torch.float32)


@pytest.mark.parametrize("unit", [MACS, WEIGHTS])
def test_as_much_is_left_as_asked_for(slimmer, unit):
    whole, least = cost_of(slimmer.model, unit), slimmer.least_share(unit)
    for share in (0.9, 0.6):
        assert cost_of(slimmer.slim(share, unit), unit) <= share * whole
    assert cost_of(slimmer.slim(least, unit), unit) / whole == pytest.approx(least)
    with pytest.raises(ValueError, match="no widths cost as little"):
        slimmer.slim(least - 0.01, unit)


def test_a_channel_costs_what_two_networks_differ_by(slimmer):
    for unit in (MACS, WEIGHTS):
        for index, name in enumerate(BLOCKS):
            inner = list(slimmer.model.widths.inner)
            inner[index] -= 1
            narrower = ResNet18(Widths(slimmer.model.widths.stages, tuple(inner)))
            difference = cost_of(slimmer.model, unit) - cost_of(narrower, unit)
            assert slimmer.channel_costs(unit)[name] == difference


def test_its_channels_are_those_of_the_dense_network(slimmer):
    slim = slimmer.slim(0.7)
    for name, channels in slimmer.channels_of(slim).items():
        left, all_ = (
            F.normalize(m.get_submodule(name).conv1.weight.flatten(1))
            for m in (slim, slimmer.model)
        )
        assert torch.equal((left @ all_.T).argmax(1), channels)  # refitted, but much the same


@pytest.mark.parametrize(("images", "fitted"), [(40, 30), (2, 2), (1, 1)])
def test_widths_are_measured_on_images_that_chose_nothing(
    tiny_model, random_images, monkeypatch, images, fitted
):
    calls = []
    pixels = random_images(images).images
    dense_of, curves_of = module.measure_dense, module.measure_curves
    monkeypatch.setattr(
        module, "measure_dense", lambda *a: calls.append(("fitted", a[5])) or dense_of(*a)
    )
    monkeypatch.setattr(
        module, "measure_curves", lambda *a: calls.append(("unseen", a[3])) or curves_of(*a)
    )
    slim = Slimmer(tiny_model, pixels, 0, torch.float32).slim(0.8)
    assert sum(slim.widths.inner) < sum(tiny_model.widths.inner)
    assert dict(calls)["fitted"] == fitted
    measured = [seen for kind, seen in calls if kind == "unseen"]
    assert len(measured) == 2  # among blocks of half their width, then in a network of that kind
    expected = pixels[fitted:] if fitted < images else pixels[-1:]
    assert all(torch.equal(seen, expected) for seen in measured)
