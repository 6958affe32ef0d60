"""Least squares for a layer, against brute force and another optimizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.fitting import regression
from common.fitting.regression import MomentSums, measure_moments
from common.fitting.sampling import Samples, outputs_of
from common.network.execution import Layer


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


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
    floor = regression.ROUNDING * float(wanted[0].square().sum())
    assert floor * 0.99 < moments.variance < 1e3 * floor


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
