"""Slim networks by share: of the multiply-adds, or of the weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import NETWORKS, build
from resnet18 import BLOCKS, ResNet18, Widths

from common.fitting import walk
from common.network.tracing import trace, trace_network
from pruning.channels import slimmer as module
from pruning.channels.costs import MACS, WEIGHTS, ChannelCosts
from pruning.channels.slimmer import CURVE_NATS, Slimmer

SHAPE = (3, 32, 32)


def cost_of(network, unit):
    if unit == MACS:
        return sum(network.macs.values())
    return sum(network.layers[name].weight.numel() for name in network.graph.layers)


def slimmer_of(model, images):
    return Slimmer(model, trace(model, SHAPE), images, 0, torch.float32)


@pytest.fixture(params=["resnet", *NETWORKS])
def slimmer(request, tiny_model, random_images):
    images = random_images(40)
    model = tiny_model if request.param == "resnet" else build(request.param, images)
    return slimmer_of(model, images)


@pytest.mark.parametrize("unit", [MACS, WEIGHTS])
def test_as_much_is_left_as_asked_for(slimmer, unit):
    costs = slimmer.costs
    whole, least = cost_of(slimmer.traced.network, unit), costs.least_share(unit)
    for share in (0.9, max(0.6, least)):
        slim = trace_network(slimmer.slim(share, unit), SHAPE)
        assert cost_of(slim, unit) <= share * whole
    narrowest = trace_network(slimmer.slim(least, unit), SHAPE)
    assert cost_of(narrowest, unit) / whole == pytest.approx(least)
    with pytest.raises(ValueError, match="no widths cost as little"):
        slimmer.slim(least - 0.01, unit)


def test_widths_cost_what_such_a_network_does(slimmer):
    share = slimmer.costs.least_share() / 2 + 0.5
    slim = trace_network(slimmer.slim(share), SHAPE)
    widths = {name: len(slim.layers[name].bias) for name in slimmer.costs.groups}
    for unit in (MACS, WEIGHTS):
        assert slimmer.costs.cost(widths, unit) == cost_of(slim, unit)
        assert slimmer.costs.cost({}, unit) == cost_of(slimmer.traced.network, unit)


def test_where_costs_multiply_the_best_widths_within_the_budget_are_nearly_found(random_images):
    """Against all widths that there are."""
    network = trace_network(build(NETWORKS[1], random_images(20)), SHAPE)
    costs = ChannelCosts(network)
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for name, grid in costs.grid.items():
        losses = torch.rand(len(grid), generator=generator).sort(descending=True).values
        curves[name] = dict(zip(grid, losses.tolist(), strict=True))
    allowed = 0.5 * costs.cost({})
    losses = []
    for widths in itertools.product(*costs.grid.values()):
        chosen = dict(zip(costs.grid, widths, strict=True))
        if costs.cost(chosen) <= allowed:
            losses.append(sum(curves[name][width] for name, width in chosen.items()))
    found = costs.choose(curves, 0.5, MACS)
    assert costs.cost(found) <= allowed
    loss = sum(curves[name][width] for name, width in found.items())
    assert sum(other < loss for other in losses) <= 0.02 * len(losses)


def test_tiny_groups_are_left_alone(random_images):
    network = trace_network(build(NETWORKS[0], random_images(20)), SHAPE)
    assert "blocks.1.excite.fc1" in ChannelCosts(network).groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.channels.costs.SMALLEST_SHARE", 0.2)
        assert "blocks.1.excite.fc1" not in ChannelCosts(network).groups


def test_a_channel_costs_what_two_resnets_differ_by(tiny_model):
    costs = ChannelCosts(trace_network(tiny_model, SHAPE))
    for index, block in enumerate(BLOCKS):
        inner = list(tiny_model.widths.inner)
        inner[index] -= 1
        narrower = ResNet18(Widths(tiny_model.widths.stages, tuple(inner))).eval()
        for unit in (MACS, WEIGHTS):
            expected = cost_of(trace_network(narrower, SHAPE), unit)
            assert costs.cost({f"{block}.conv1": inner[index]}, unit) == expected


def test_its_channels_are_those_of_the_dense_network(slimmer):
    share = slimmer.costs.least_share() / 2 + 0.5
    slim = slimmer.slim(share)
    found = slimmer.channels_of(slim)
    for name, group in slimmer.costs.groups.items():
        assert len(found[name]) == len(slim.get_submodule(name).weight)
        others = (*group.producers, *group.between)
        assert all(torch.equal(found[name], found[other]) for other in others)


@pytest.mark.parametrize(("images", "fitted"), [(40, 60), (2, 3), (1, 2)])
def test_widths_are_measured_on_images_that_chose_nothing(
    tiny_model, random_images, monkeypatch, images, fitted
):
    calls = []
    pixels = random_images(images)
    dense_of, curves_of = module.measure_dense, module.measure_curves
    monkeypatch.setattr(
        module, "measure_dense", lambda *a: calls.append(("fitted", a[7])) or dense_of(*a)
    )
    monkeypatch.setattr(
        module, "measure_curves", lambda *a: calls.append(("unseen", a[4])) or curves_of(*a)
    )
    slimmer = slimmer_of(tiny_model, pixels)
    slimmer.slim(0.8)
    assert dict(calls)["fitted"] == fitted
    measured = [seen.images for kind, seen in calls if kind == "unseen"]
    assert len(measured) == 2  # among blocks of half their width, then in a network of that kind
    # Of each fitted image its mirror image was too.
    expected = pixels.images[fitted // 2 :] if images > 2 else pixels.images[-1:]
    assert all(torch.equal(seen, expected) for seen in measured)


def test_a_network_without_free_channels_stays_as_it_is(random_images):
    images = random_images(8)
    conv, pool = torch.nn.Conv2d(3, 10, 3), torch.nn.AdaptiveAvgPool2d(1)
    slimmer = slimmer_of(torch.nn.Sequential(conv, pool, torch.nn.Flatten()).eval(), images)
    assert slimmer.costs.least_share() == 1
    assert [*slimmer.slim(1.0).state_dict()] == ["0.weight", "0.bias"]


def test_a_network_as_narrow_as_can_be_keeps_its_channels(random_images):
    narrow = Widths((1,) * 4)
    slimmer = slimmer_of(ResNet18(narrow).eval(), random_images(4))
    assert slimmer.costs.least_share() == 1
    assert Widths.of(slimmer.slim(1.0).state_dict()) == narrow


@pytest.mark.parametrize("unit", [MACS, WEIGHTS])
def test_a_search_begins_where_the_curves_add_up_to_the_budget(tiny_model, random_images, unit):
    slimmer = slimmer_of(tiny_model, random_images(40))
    curves = {
        name: {width: (1 - width / group.width) / 10 for width in slimmer.costs.grid[name]}
        for name, group in slimmer.costs.groups.items()
    }
    vars(slimmer)["_curves"] = vars(slimmer)["_weight_curves"] = curves

    def divergence(share):
        widths = slimmer.costs.choose(curves, share, unit)
        return sum(curves[name][width] for name, width in widths.items())

    for max_drop in (0.02, 0.07):
        where, nats = slimmer.search_range(unit, max_drop), CURVE_NATS * max_drop
        assert divergence(1 / where.start) <= nats < divergence(1 / where.start - 0.02)
        assert 1 / where.most == slimmer.costs.least_share(unit)
    assert 1 / slimmer.search_range(unit, 10.0).start < 1 / where.most + 0.02  # all that can go


def test_a_network_to_code_is_as_narrow_as_pays(tiny_model, random_images):
    slimmer = slimmer_of(tiny_model, random_images(40))
    grid = slimmer.costs.grid

    def start(lost):
        """Return the share of the weights to begin with where each narrowing costs ``lost``."""
        vars(slimmer)["_weight_curves"] = {
            name: {width: lost * (widths[-1] - width) / widths[-1] for width in widths}
            for name, widths in grid.items()
        }
        return 1 / slimmer.coding_range(0.01).start

    least = slimmer.costs.least_share(WEIGHTS)
    assert start(0.0) < 1.02 * least  # what costs nothing goes
    assert start(10.0) == pytest.approx(max(least, 0.97))  # what costs more than coding does stays
    assert start(0.0) <= start(0.02) <= start(10.0)


def test_curves_of_weights_are_measured_on_means_of_two_images_too(
    tiny_model, random_images, monkeypatch
):
    seen = []

    def measure(network, groups, choices, context, images):
        seen.append(images.images)
        return {name: dict.fromkeys(widths, float(len(seen))) for name, widths in choices.items()}

    monkeypatch.setattr(module, "measure_curves", measure)
    slimmer = slimmer_of(tiny_model, random_images(8))
    assert set(next(iter(slimmer._curves_for(MACS).values())).values()) == {2.0}
    assert set(next(iter(slimmer._curves_for(WEIGHTS).values())).values()) == {(2 + 3 / 3) / 2}
    first, second = seen[1][:2].double(), seen[2][1].double()
    assert torch.equal(second, first.mean(0).floor())


def test_mirror_images_are_used_too_as_far_as_memory_allows(random_images, monkeypatch):
    images = random_images(40)
    used = []
    measure = module.measure_dense
    monkeypatch.setattr(
        module, "measure_dense", lambda *given: used.append(given) or measure(*given)
    )

    def slim():
        slimmer = slimmer_of(build(NETWORKS[0], images), images)
        slimmer.slim(0.8)
        *_, pairs, _, _, _, fitted, positions = used.pop()
        unseen = slimmer._unseen.images
        seen = [pixels for pixels in pairs.images[:fitted] for other in unseen
                if torch.equal(pixels, other)]  # fmt: skip
        assert not seen
        return pairs.images, fitted, positions, slimmer

    pairs, fitted, positions, slimmer = slim()
    assert (len(pairs), fitted, positions, len(slimmer._unseen)) == (80, 60, 16, 10)
    assert torch.equal(pairs[::2], images.images)
    assert torch.equal(pairs[1::2], images.images.flip(3))
    peak = walk.peak_bytes_per_image(slimmer.traced.network, 4)
    monkeypatch.setattr(walk, "MEMORY_BYTES", 20 * peak)
    some, fitted, positions, _ = slim()
    assert (len(some), fitted, positions) == (20, 15, 64)
    assert torch.equal(some, pairs[:20])
