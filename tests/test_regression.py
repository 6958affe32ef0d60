"""Least squares for a layer, against convolutions, unfolding and brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import Bottleneck, MobileNet, build

from common.network import regression
from common.network.execution import Layer
from common.network.graph import CONVOLUTION, LINEAR, Operation
from common.network.regression import (
    ROUNDING,
    MomentSums,
    Samples,
    active_range,
    completed_sum,
    draw_positions,
    inputs_at,
    measure_moments,
    outputs_at,
    outputs_of,
)
from common.network.tracing import trace_network

CONVOLUTIONS = [
    # kernel, stride, padding, dilation, groups
    ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((5, 3), (1, 2), (2, 0), (1, 1), 2),
    ((3, 3), (1, 1), (2, 4), (2, 3), 4),
    ((7, 7), (2, 2), (3, 3), (1, 1), 1),
]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def convolution(generator, kernel, stride, padding, dilation, groups):
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator)
    layer = Layer(weight, torch.randn(8, generator=generator))
    return Operation("c", CONVOLUTION, ("x",), attributes), layer


def run(operation, layer, x):
    a = operation.attributes
    return F.conv2d(
        x, layer.weight, layer.bias, a["stride"], a["padding"], a["dilation"], a["groups"]
    )


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_inputs_are_what_a_convolution_reads(generator, settings):
    operation, layer = convolution(generator, *settings)
    groups = settings[-1]
    x = torch.randn(3, 4, 11, 9, generator=generator)
    y = run(operation, layer, x)
    positions = draw_positions(y, 5, generator)
    rows = inputs_at(operation, layer, x, positions)
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    found = torch.einsum("ngc,goc->ngo", rows, weight).flatten(1) + layer.bias
    torch.testing.assert_close(found, outputs_at(y, positions), rtol=1e-4, atol=1e-4)
    # All positions in order are torch's own unfolding.
    total = y.shape[2] * y.shape[3]
    everywhere = torch.arange(total).expand(len(x), total)
    kernel, stride, padding, dilation, _ = settings
    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    assert torch.equal(inputs_at(operation, layer, x, everywhere).flatten(1), unfolded)


def test_positions_are_distinct_and_no_more_than_there_are(generator):
    positions = draw_positions(torch.empty(4, 2, 3, 5), 8, generator)
    assert positions.shape == (4, 8)
    assert all(len(set(row)) == 8 and max(row) < 15 for row in positions.tolist())
    assert draw_positions(torch.empty(4, 2, 2, 2), 8, generator).shape == (4, 4)
    assert draw_positions(torch.empty(4, 2), 8, generator) is None


def moments_of(layer, groups, rows, wanted):
    sums = MomentSums(layer, groups)
    for part, outputs in zip(rows.split(100), wanted.split(100), strict=True):
        sums.add(part, outputs)
    return sums.moments()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_refitting_is_ridge_regression_around_the_layer(generator, groups):
    """Against least squares on rows of their own for the ridge, an intercept among the columns."""
    mixing = torch.randn(groups, 6, 6, generator=generator)
    rows = torch.randn(350, groups, 6, generator=generator)
    rows = torch.einsum("ngc,gcd->ngd", rows, mixing) + 1
    layer = Layer(torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator))
    wanted = torch.randn(350, 8, generator=generator)
    ridge = torch.linspace(0.5, 2, groups)
    moments = moments_of(layer, groups, rows, wanted)
    fitted = moments.refit(layer, ridge)
    assert moments.variance == pytest.approx(float(wanted.var(0, correction=0).sum()), rel=1e-4)
    size = 8 // groups
    for group in range(groups):
        outputs = slice(group * size, (group + 1) * size)
        x = F.pad(rows[:, group], (0, 1), value=1.0).double()
        pull = (350 * ridge[group].double()).sqrt() * torch.eye(7, dtype=torch.double)[:6]
        anchor = F.pad(layer.weight[outputs], (0, 1)).double()
        left = torch.cat([x, pull])
        right = torch.cat([wanted[:, outputs].double(), pull @ anchor.T])
        solution = torch.linalg.lstsq(left, right).solution.T.float()
        torch.testing.assert_close(fitted.weight[outputs], solution[:, :6], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted.bias[outputs], solution[:, 6], rtol=1e-3, atol=1e-4)
        given = rows[:, group] @ layer.weight[outputs].T
        mean, variance = moments.output_statistics(layer.weight)
        torch.testing.assert_close(mean[outputs], given.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            variance[outputs], given.var(0, correction=0), rtol=1e-3, atol=1e-3
        )


def test_a_layer_that_reads_zeros_alone_stays_as_it_is(generator):
    layer = Layer(torch.randn(4, 3, generator=generator), torch.zeros(4))
    wanted = torch.randn(50, 4, generator=generator)
    moments = moments_of(layer, 1, torch.zeros(50, 1, 3), wanted)
    fitted = moments.refit(layer, 0.01 * moments.squares)
    assert torch.equal(fitted.weight, layer.weight)
    torch.testing.assert_close(fitted.bias, wanted.mean(0))


def test_rounding_is_no_negative_variance(generator):
    layer = Layer(torch.randn(4, 3, generator=generator), torch.zeros(4))
    wanted = torch.tensor([[0.1, 1000.3, -30.7, 7.7]]).expand(50, 4)
    moments = moments_of(layer, 1, torch.randn(50, 1, 3, generator=generator), wanted)
    floor = ROUNDING * float(wanted[0].square().sum())
    assert floor * 0.99 < moments.variance < 1e3 * floor


def test_all_of_a_linear_layers_inputs_are_read(generator):
    operation, layer = Operation("l", LINEAR, ("x",)), Layer(torch.ones(2, 5), torch.zeros(2))
    x = torch.randn(3, 5, generator=generator)
    assert torch.equal(inputs_at(operation, layer, x, None)[:, 0], x)


def test_the_last_operand_completes_a_sum(random_images):
    images = random_images(8)
    network = trace_network(build(Bottleneck, images), images.shape)
    addition, other = completed_sum(network, "conv3")
    assert (network.graph[addition].kind, other) == ("add", "down.0")
    assert completed_sum(network, "down.0") is None
    assert completed_sum(network, "conv1") is None
    mobile = trace_network(build(MobileNet, images), images.shape)
    assert completed_sum(mobile, "blocks.0.project.0")[1] == "stem.0"
    assert completed_sum(mobile, "blocks.1.project.0") is None


def test_outputs_count_where_the_activation_after_them_is_not_flat(random_images):
    images = random_images(8)
    network = trace_network(build(Bottleneck, images), images.shape)
    found = {name: active_range(network, name) for name in network.layers}
    relu = (0.0, float("inf"))
    # The shortcut "down.0" runs before conv3, which completes the sum; nothing follows "fc".
    no_range = {"down.0": None, "fc": None}
    assert found == dict.fromkeys(("stem.0", "conv1", "conv2", "conv3"), relu) | no_range
    mobile = trace_network(build(MobileNet, images), images.shape)
    assert active_range(mobile, "blocks.0.expand.0") == (0, 6)
    assert active_range(mobile, "blocks.0.filter.0") == (-3, float("inf"))
    assert active_range(mobile, "blocks.0.project.0") is None  # its sum is read as it is
    for name, function in (
        ("relu", F.relu), ("relu6", F.relu6), ("hardswish", F.hardswish),
        ("hardsigmoid", F.hardsigmoid),
    ):  # fmt: skip
        low, high = regression.ACTIVE_RANGES[name]
        beyond = torch.tensor([low - 5, low - 0.01, low])
        assert function(beyond).unique().numel() == 1
        if high < float("inf"):
            assert function(torch.tensor([high, high + 0.01, high + 5])).unique().numel() == 1


def test_relaxed_targets_differ_where_the_activation_is_flat():
    """By hand, for ReLU6, with 1 added to each output."""
    wanted = torch.tensor([[-4.0, -4.0, 2.0, 7.0, 7.0]])
    given = torch.tensor([[-3.0, 5.0, -8.0, 9.0, 3.0]])  # all from the bias
    samples = Samples(torch.zeros(1, 1, 2), wanted, torch.ones(1, 5))
    relaxed = samples.relaxed(Layer(torch.zeros(5, 2), given[0]), (0.0, 6.0))
    assert relaxed.wanted.tolist() == [[-3.0, -1.0, 2.0, 9.0, 5.0]]


def test_each_repetition_of_the_regression_lowers_the_error_after_the_relu(generator, monkeypatch):
    rows = torch.randn(400, 2, 6, generator=generator)
    layer = Layer(torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator))
    added = torch.randn(400, 8, generator=generator)
    # A function that no linear layer is.
    wanted = (2 * outputs_of(rows, torch.randn(8, 6, generator=generator))).tanh() * 3 - added
    ridge = torch.full((2,), 1e-6)
    draw = lambda: [Samples(r, w, a) for r, w, a in zip(  # noqa: E731
        rows.split(100), wanted.split(100), added.split(100), strict=True
    )]  # fmt: skip

    def fitted(repetitions):
        monkeypatch.setattr(regression, "RELAXATIONS", repetitions)
        moments = measure_moments(layer, 2, draw, lambda _: ridge, (0.0, float("inf")))
        return moments.refit(layer, ridge)

    def error(layer):
        given = outputs_of(rows, layer.weight) + layer.bias
        return float(((given + added).relu() - (wanted + added).relu()).square().sum())

    errors = [error(fitted(repetitions)) for repetitions in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.95 * errors[0]
    # None to repeat: plain least squares.
    plain = measure_moments(layer, 2, draw, lambda _: ridge, None).refit(layer, ridge)
    torch.testing.assert_close(plain.weight, fitted(0).weight)
    best = Layer(*(p.clone().requires_grad_() for p in (plain.weight, plain.bias)))
    optimizer = torch.optim.LBFGS([best.weight, best.bias], max_iter=200)

    def closure():
        optimizer.zero_grad()
        given = outputs_of(rows, best.weight) + best.bias
        loss = ((given + added).relu() - (wanted + added).relu()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        assert error(fitted(50)) == pytest.approx(error(best), rel=0.02)
