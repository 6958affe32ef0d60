"""Damage curves: what unseen changes cost."""

import numpy as np

from pruning.together.allocation import AMOUNTS, _curve, greedy_counts


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
