"""The plots of a pruning run: one of each amount."""

from __future__ import annotations

from pathlib import Path

from pruning.report import plots


def test_amounts_that_differ_in_any_digit_have_plots_of_their_own(monkeypatch):
    for name in ("plot_sensitivity", "plot_amounts", "plot_search"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    amounts, names = (0.5, 0.07, 0.123456789, 0.123456788, 1e-9), []
    results = {
        "arguments": {"tolerance": 0.02},
        "baseline": {"value": 0.9},
        "linear_search": {"tolerance": 0.02},
        "ranking": [{"amount": amount} for amount in amounts],
        "sensitivity": [],
    }
    plots.draw_all(results, lambda name: names.append(name) or Path(name))
    told = ("50", "7", "12.3456789", "12.3456788", "0.0000001")
    assert [name for name in names if name.endswith("_sorted.png")] == [
        f"sensitivity_{amount}_sorted.png" for amount in told
    ]
    assert len(names) == len(set(names))
