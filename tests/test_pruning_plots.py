"""The plots of a pruning run: one of each amount."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

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


def test_the_answer_is_rounded_down_and_no_label_lies_on_its_line(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    amounts = [0.5, 0.75, 0.875, 0.96, 0.99669]
    plots.plot_search(
        {
            "layers": ["linear"], "tolerance": 0.02, "dense": {"value": 0.92},
            "max_amount": 0.99669, "exhaustive_max_amount": 0.99669,
            "curve": [[level / 1000, 0.92 - 0.00001 * level] for level in range(1001)],
            "steps": [{"amount": a, "accuracy": {"value": 0.91}, "kept": True} for a in amounts],
        },
        tmp_path / "plot.png",
    )  # fmt: skip
    (figure,) = figures
    whole, near = figure.axes
    assert whole.get_title(loc="left") == "99.66 % of the linear layer can go within 2 points"
    assert [text.get_text() for text in whole.texts] == ["1", "2", "3", "4"]
    assert [text.get_text() for text in near.texts] == ["4"]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "found 99.66 %, the largest of all amounts" in told


def test_layers_whose_interval_crosses_the_limit_are_not_counted(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    rows = [
        {"layer": f"{drop}", "comparison": {"drop": drop, "ci95": [drop - 0.01, drop + 0.01]}}
        for drop in (0.05, 0.025, 0.015, 0.005)
    ]
    plots.plot_sensitivity(rows, 0.9265, 0.02, 0.9, False, tmp_path / "plot.png")
    (figure,) = figures
    assert figure.axes[0].get_title(loc="left").startswith("1 of 4 layers clearly lose more than 2")
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"dense: 92.65 %", "loses more than 2 points", "loses less"} <= set(told)
