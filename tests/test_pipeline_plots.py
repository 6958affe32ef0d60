"""pipeline/plots.py: what is doubted in the plot."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from common.report.results import DOUBT
from pipeline import plots


def entry(name: str, noisy: bool) -> dict:
    return {
        "name": name, "size_bytes": 1000, "goal": name, "trained": False,
        "comparison": {"drop": 0.001, "ci95": [-0.01, 0.01]},
        "latency": [{"images_per_second": 100.0, "batch_size": 32, "noisy": noisy}],
    }  # fmt: skip


@pytest.mark.parametrize("noisy", [False, True])
def test_noisy_speeds_have_question_marks(noisy, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    results = {
        "models": [entry("fp32", False), entry("int8", noisy)],
        "answers": [entry("size", noisy)],
        "tried": [entry("size", noisy)],
        "budget": {"max_drop": 0.01},
        "weights": {"coded": False},
    }
    plots.plot_frontier(results, tmp_path / "plot.png")
    (figure,) = figures
    small, fast = figure.axes
    assert not any(text.get_text() for text in small.texts)
    assert [text.get_text() for text in fast.texts] == ["", *["?" if noisy else ""] * 2]
    assert figure.get_supxlabel().replace("\n", " ") == (DOUBT if noisy else "")
