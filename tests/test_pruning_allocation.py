import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from common.command.cli import UserError
from common.network.tracing import trace_network
from pruning.together import allocation
from pruning.together.allocation import AMOUNTS, DamageCurve, _curve, greedy_counts


def make_weights(seed, with_ties=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3, 3, 3), "b": (6, 5), "c": (2, 7)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (w * 2).round() if with_ties else w for name, w in weights.items()}


def as_modules(weights):
    modules = []
    for weight in weights.values():
        module = nn.Module()
        module.weight = nn.Parameter(weight.clone())
        modules.append(module)
    return modules


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.floats(0.01, 0.99), st.booleans())
def test_global_keeps_what_torch_keeps(seed, sparsity, with_ties):
    weights = make_weights(seed, with_ties)
    modules = as_modules(weights)
    prune.global_unstructured(
        [(module, "weight") for module in modules], prune.L1Unstructured, amount=sparsity
    )
    found = allocation.global_masks(weights, sparsity)
    for mask, module in zip(found.values(), modules, strict=True):
        assert torch.equal(mask, module.weight_mask.bool())


def test_scopes_divide_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 2))
    network = trace_network(model.eval(), (3, 8, 8))
    weights = {name: layer.weight for name, layer in network.layers.items()}
    scopes = {"all": ["0", "2", "3"], "conv": ["0"], "linear": ["2", "3"]}
    for scope, names in scopes.items():
        assert list(allocation.weights_in_scope(network, weights, scope)) == names


def test_scope_without_a_layer_is_told():
    network = trace_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), (3, 8, 8))
    with pytest.raises(UserError, match="--scope conv: the network has no such layer"):
        allocation.weights_in_scope(network, {"1": network.layers["1"].weight}, "conv")


# --- by sensitivity ------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=4
)  # weights, damage


def make_curve(parts):
    counts, damage = zip(*parts, strict=True)
    return DamageCurve(
        np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0.0], np.cumsum(damage)])
    )


def damage_at(curve, count):
    return float(np.interp(count, curve.counts, curve.damage))


@settings(max_examples=150)
@given(st.lists(steps, min_size=1, max_size=3), st.data())
def test_greedy_finds_the_least_damage_there_is(parts, data):
    """Against every way to share out the total, on the convex curves that greedy goes by."""
    curves = {str(index): make_curve(part).convex() for index, part in enumerate(parts)}
    total = data.draw(st.integers(0, int(sum(curve.counts[-1] for curve in curves.values()))))
    found = greedy_counts(curves, total)
    assert sum(found.values()) == total
    ranges = [range(int(curve.counts[-1]) + 1) for curve in curves.values()]
    least = min(
        sum(map(damage_at, curves.values(), counts))
        for counts in itertools.product(*ranges)
        if sum(counts) == total
    )
    assert sum(map(damage_at, curves.values(), found.values())) == pytest.approx(least)


@given(steps)
def test_hull_is_convex_and_never_above(parts):
    curve = make_curve(parts)
    hull = curve.convex()
    assert (hull.counts[0], hull.counts[-1]) == (curve.counts[0], curve.counts[-1])
    assert (np.diff(np.diff(hull.damage) / np.diff(hull.counts)) >= -1e-12).all()
    assert (np.interp(curve.counts, hull.counts, hull.damage) <= curve.damage + 1e-9).all()


@given(st.lists(steps, min_size=1, max_size=4), st.data())
def test_a_larger_budget_only_takes_more(parts, data):
    curves = {str(index): make_curve(part) for index, part in enumerate(parts)}
    capacity = int(sum(curve.counts[-1] for curve in curves.values()))
    less, more = sorted(data.draw(st.tuples(*[st.integers(0, capacity)] * 2)))
    smaller, larger = greedy_counts(curves, less), greedy_counts(curves, more)
    assert all(smaller[name] <= larger[name] for name in curves)


def test_budget_beyond_the_curves_is_a_bug():
    with pytest.raises(ValueError, match="end 1 weights before"):
        greedy_counts({"a": make_curve([(3, 1)])}, 4)


def test_sensitivity_prunes_the_smallest_of_the_cheapest():
    weights = make_weights(5)
    curves = {
        "a": DamageCurve(np.array([0, 54, 108]), np.array([0.0, 1.0, 9.0])),
        "b": DamageCurve(np.array([0, 15, 30]), np.array([0.0, 0.0, 0.5])),
        "c": DamageCurve(np.array([0, 7, 14]), np.array([0.0, 9.0, 99.0])),
    }
    found = allocation.sensitivity_masks(weights, curves, 60 / 152)
    assert [int((~mask).sum()) for mask in found.values()] == [45, 15, 0]
    smallest = weights["b"].abs().flatten().sort().values[:15]
    assert torch.equal(weights["b"][~found["b"]].abs().sort().values, smallest)


def test_steps_without_a_change_are_not_free():
    """Of two layers that both change nothing, the one that saves more is pruned first."""
    nothing = np.zeros(len(AMOUNTS))
    curves = {"small": _curve(640, nothing, 100), "large": _curve(64_000, nothing, 100)}
    assert greedy_counts(curves, 32_000) == {"small": 0, "large": 32_000}
    assert curves["small"].damage.tolist() == [step / 100 for step in range(len(AMOUNTS))]


def test_gains_by_chance_count_nothing():
    damage = np.array([0.05, 0.03, 0.05, 0.04, 0.09, 0.08, 0.2])
    rises = _curve(6400, damage, 100).damage - np.arange(7) / 100
    np.testing.assert_allclose(rises, [0, 0, 0, 0, 0.04, 0.04, 0.15], atol=1e-12)
