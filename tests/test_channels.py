"""Removing channels: the closed forms against brute force, and what must cost nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build
from resnet18 import ResNet18, Widths

from common.fitting.regression import MomentSums
from common.network.execution import Layer
from common.network.tracing import trace
from pruning.channels import repair as repair_module
from pruning.channels.allocation import as_curve, choose_widths, measure_curves, width_grid
from pruning.channels.groups import find_groups
from pruning.channels.repair import measure_dense, repair
from pruning.channels.slimming import slim_network
from pruning.channels.surgeon import (
    DAMPING,
    ChannelChoice,
    Reader,
    columns_of,
    damped,
    removal_costs,
    remove_channels,
    without,
)

FULL = Widths((4, 8, 8, 8))
SHAPE = (3, 32, 32)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def reader_of(inputs, weight, window=9):
    layer = Layer(weight[:, :-1], weight[:, -1].clone())
    sums = MomentSums(layer, 1)
    sums.add(inputs[:, None])
    return Reader.start(layer, sums.moments(), layer.weight[0].numel() // window)


def sample(generator, channels=4, outputs=3, rows=400, window=9):
    size = channels * window
    mixing = torch.randn(size, size, generator=generator)
    inputs = torch.randn(rows, size, generator=generator) @ mixing + 1
    weight = torch.randn(outputs, size + 1, generator=generator).double()
    return inputs.double(), weight


def least_squares(inputs, weight, columns, ridge):
    """Fit the outputs of all columns by some, with an intercept: by rows of its own for the ridge.

    Returns:
        Weights of the columns, the intercept, and the squared error with the ridge's.
    """
    size = inputs.shape[1]
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1) / len(inputs) ** 0.5
    rows = torch.cat([rows, ridge**0.5 * torch.eye(size + 1).double()[:size]])
    outputs = rows @ weight.T
    left = [*columns, size]
    solution = torch.linalg.lstsq(rows[:, left], outputs).solution
    error = float((rows[:, left] @ solution - outputs).square().sum())
    return solution[:-1].T, solution[-1], error


def test_the_cheapest_channel_is_that_of_least_squares(generator):
    inputs, weight = sample(generator)
    reader = reader_of(inputs, weight)
    ridge = float(DAMPING * inputs.square().mean())
    found = []
    for channel in range(4):
        columns = [c for c in range(36) if c // 9 != channel]
        found.append((columns, *least_squares(inputs, weight, columns, ridge)))
    errors = [error for *_, error in found]
    costs = removal_costs(reader.weight, reader.inverse, 9)
    torch.testing.assert_close(costs, torch.tensor(errors).double())
    cheapest = errors.index(min(errors))
    columns, best, bias, _ = found[cheapest]
    updated, inverse = without(reader.weight, reader.inverse, columns_of(costs.argmin()[None], 9))
    torch.testing.assert_close(updated, best)
    covariance = damped(reader.moments)
    torch.testing.assert_close(inverse, torch.linalg.inv(covariance[columns][:, columns]))
    kept = remove_channels({"r": reader}, [3])[3]
    assert kept.channels.tolist() == [c for c in range(4) if c != cheapest]
    torch.testing.assert_close(kept.layers["r"].weight, best)
    torch.testing.assert_close(kept.layers["r"].bias, bias)


def test_several_readers_cost_the_sum_of_their_shares(generator):
    """Readers with other windows, one of whose outputs are a thousand times as large."""
    samples = [sample(generator, channels=5, window=window) for window in (4, 1)]
    samples[1] = (samples[1][0], 1000 * samples[1][1])
    shares = torch.zeros(5).double()
    for (inputs, weight), window in zip(samples, (4, 1), strict=True):
        ridge = float(DAMPING * inputs.square().mean())
        variance = float((inputs @ weight[:, :-1].T).var(0, correction=0).sum())
        for channel in range(5):
            columns = [c for c in range(5 * window) if c // window != channel]
            shares[channel] += least_squares(inputs, weight, columns, ridge)[2] / variance
    readers = {
        str(window): reader_of(*one, window) for one, window in zip(samples, (4, 1), strict=True)
    }
    kept = remove_channels(readers, [4])[4]
    assert kept.channels.tolist() == [c for c in range(5) if c != shares.argmin()]
    assert {name: tuple(layer.weight.shape) for name, layer in kept.layers.items()} == {
        "4": (3, 16), "1": (3, 4),
    }  # fmt: skip


def test_dead_and_doubled_channels_cost_nothing(generator):
    inputs, weight = sample(generator, channels=6)
    inputs[:, 9:18] = 0
    inputs[:, 36:45] = inputs[:, 18:27]
    kept = remove_channels({"r": reader_of(inputs, weight)}, [6, 5, 4])
    assert torch.allclose(kept[6].layers["r"].weight, weight[:, :-1])
    assert kept[5].channels.tolist() == [0, 2, 3, 4, 5]
    assert kept[4].channels.tolist() in ([0, 2, 3, 5], [0, 3, 4, 5])
    layer = kept[4].layers["r"]
    found = inputs[:, columns_of(kept[4].channels, 9)] @ layer.weight.T + layer.bias
    expected = inputs @ weight[:, :-1].T + weight[:, -1]
    assert (found - expected).square().mean() < 1e-3 * expected.var()


def test_channels_that_never_fire_and_layers_of_zeros_are_removed_like_others(generator):
    inputs, weight = sample(generator)
    for change in ("inputs", "weight"):
        x, w = (0 * inputs, weight) if change == "inputs" else (inputs, 0 * weight)
        kept = remove_channels({"r": reader_of(x, w)}, [2])[2].layers["r"]
        assert kept.weight.isfinite().all()
        assert kept.bias.isfinite().all()


@pytest.mark.parametrize(
    ("width", "grid"),
    [
        (512, [64, 96, *range(128, 513, 64)]),
        (256, [32, 48, *range(64, 257, 32)]),
        (64, [16, 32, 48, 64]),
        (40, [16, 32, 40]),
        (5, [1, 2, 3, 4, 5]),
    ],
)
def test_widths_are_what_kernels_like(width, grid):
    assert width_grid(width) == grid


def test_chosen_widths_are_the_best_of_all(generator):
    for seed in range(5):
        generator.manual_seed(seed)
        curves = {
            name: dict(zip((1, 2, 4), torch.rand(3, generator=generator).tolist(), strict=True))
            for name in "abcd"
        }
        costs = {name: {w: (i + 1.0) * w for w in (1, 2, 4)} for i, name in enumerate("abcd")}
        budget = 20.0
        chosen = choose_widths(curves, costs, budget)
        assert sum(costs[name][width] for name, width in chosen.items()) <= budget
        best = min(
            sum(curves[name][width] for name, width in zip("abcd", widths, strict=True))
            for widths in itertools.product((1, 2, 4), repeat=4)
            if sum(costs[n][w] for n, w in zip("abcd", widths, strict=True)) <= budget
        )
        assert sum(curves[name][width] for name, width in chosen.items()) == pytest.approx(best)
    # Each block's cost rounded up, the four were found to be over the budget that they just fit.
    assert choose_widths(curves, costs, 10.0) == dict.fromkeys("abcd", 1)


def make_redundant(model, groups):
    """Make half of the channels of every group copies of the others, or dead."""
    with torch.no_grad():
        for group in groups.values():
            half = group.width // 2
            for name in (*group.producers, *group.between):
                norm = trace(model, SHAPE).norms.get(name)
                modules = [model.get_submodule(n) for n in (name, norm) if n]
                for tensor in (t for m in modules for t in m.state_dict().values() if t.ndim):
                    tensor[half : 2 * half] = tensor[:half]
            if not group.between and group.name in trace(model, SHAPE).norms:
                norm = model.get_submodule(trace(model, SHAPE).norms[group.name])
                norm.weight[half], norm.bias[half] = 0, -1


def prepare(model, images, widths):
    traced = trace(model, SHAPE)
    groups = find_groups(traced.network)
    grid = {name: sorted({widths(g.width), g.width}) for name, g in groups.items()}
    dense = measure_dense(model, traced, groups, images, grid, 0, torch.float32)
    return dense, {name: widths(group.width) for name, group in groups.items()}


def truncated(dense, widths):
    """Return the network with the first channels of every group, nothing made up for."""
    network = dense.traced.network
    choices = {}
    for name, group in dense.groups.items():
        channels = torch.arange(widths[name])
        layers = {
            reader: Layer(
                network.layers[reader].weight[:, columns_of(channels, spread)],
                network.layers[reader].bias,
            )
            for reader, spread in group.readers.items()
        }
        choices[name] = ChannelChoice(channels, layers)
    return slim_network(network, dense.groups, choices)


@pytest.fixture(params=[*NETWORKS, lambda: ResNet18(FULL)])
def model(request, random_images):
    return build(request.param, random_images(64))


@torch.no_grad()
def test_a_network_of_doubled_channels_is_as_good_at_half_its_width(model, random_images):
    make_redundant(model, find_groups(trace(model, SHAPE).network))
    images = random_images(160)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense, half = prepare(model, images, lambda width: width // 2)
    slim = repair(dense, half)
    assert {n: len(slim.get_submodule(n).weight) for n in half} == half
    x = images.normalize(images.images)
    expected = model(x)
    assert (slim(x) - expected).square().mean().sqrt() < 0.1 * expected.std()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    curves = measure_curves(dense.network, dense.groups, dense.choices, half, images)
    assert all(curve[half[name]] < 5e-3 for name, curve in curves.items())


@torch.no_grad()
def test_repair_brings_a_narrow_network_closer(model, random_images):
    images, others = random_images(200), random_images(64, seed=3)
    dense, widths = prepare(model, images, lambda width: width - width // 4)
    slim = repair(dense, widths)
    x = others.normalize(others.images)
    expected = model(x)
    repaired = (slim(x) - expected).square().mean()
    assert repaired < 0.5 * (truncated(dense, widths)(x) - expected).square().mean()
    slim.train()  # the batch norms know what the weights give: training goes on from there
    for module in slim.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    x = images.normalize(images.images)
    trained = slim(x)
    assert (trained - slim.eval()(x)).square().mean() < 0.2 * trained.var()


@torch.no_grad()
def test_curves_are_those_of_whole_networks(model, random_images):
    """Each width's divergence again, by a network put together and run from the images on."""
    images = random_images(70)
    dense, context = prepare(model, images, lambda width: width // 2)
    found = measure_curves(dense.network, dense.groups, dense.choices, context, images)
    x = images.normalize(images.images)
    expected = model(x).log_softmax(1)

    def divergence(widths):
        choices = {name: dense.choices[name][width] for name, width in widths.items()}
        logits = slim_network(dense.network, dense.groups, choices)(x).log_softmax(1)
        return F.kl_div(logits, expected, reduction="none", log_target=True).sum(1)

    for name, group in dense.groups.items():
        over = divergence(context) - divergence({**context, name: group.width})
        mean, error = float(over.mean()), float(over.std(correction=0)) / len(images) ** 0.5
        assert found[name][context[name]] == pytest.approx(max(mean + error, 0), abs=1e-5)
        assert found[name][group.width] == 0


def test_no_width_loses_less_than_a_larger_one():
    lost = {8: [0.0, 0.0], 6: [0.3, 0.3], 4: [0.1, 0.1], 2: [0.2, 0.6]}
    curve = as_curve({width: torch.tensor(of_images) for width, of_images in lost.items()})
    assert list(curve) == [2, 4, 6, 8]
    assert curve == pytest.approx({2: 0.4 + 0.2 / 2**0.5, 4: 0.3, 6: 0.3, 8: 0.0})


@torch.no_grad()
def test_layers_make_up_for_those_before_them(random_images, monkeypatch):
    model = build(lambda: ResNet18(FULL), random_images(64))
    images = random_images(200)
    dense, widths = prepare(model, images, lambda width: width - 2)
    for stream in ("conv1", *(f"layer{stage}.0.shortcut.0" for stage in (2, 3, 4))):
        widths[stream] = dense.groups[stream].width
    x = images.normalize(images.images)

    def error():
        return (repair(dense, widths)(x) - model(x)).square().mean()

    refitted = error()
    monkeypatch.setattr(repair_module, "INNER_DAMPING", 1e9)  # as it was
    assert refitted < 0.95 * error()


@torch.no_grad()
def test_zero_gammas_leave_finite_networks(random_images):
    model = build(lambda: ResNet18(FULL), random_images(64))
    model.layer1[0].bn2.weight.zero_()
    model.layer2[0].bn1.weight.zero_()
    model.layer2[0].bn1.bias.fill_(-1.0)  # its channels never fire
    images = random_images(64)
    dense, half = prepare(model, images, lambda width: width // 2)
    slim = repair(dense, half)
    x = images.normalize(images.images)
    assert (slim(x) - model(x)).abs().max() < 2 * model(x).std()
    assert all(t.isfinite().all() for t in slim.state_dict().values())
