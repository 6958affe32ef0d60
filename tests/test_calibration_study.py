"""The calibration study's table and what it supports."""

from __future__ import annotations

import pytest

from benchmarks.calibration_study import best_row, format_study, make_row


@pytest.fixture
def rows():
    observers = ("histogram", "minmax", "moving-average", "percentile")
    return [
        make_row(name, size, (0.9 - 0.01 * i, 0.92, 0.91), (0.97, 0.94 + 0.01 * i, 0.98))
        for i, name in enumerate(observers)
        for size in (32, 128, 512)
    ]


def test_mean_and_spread():
    row = make_row("minmax", 32, (0.90, 0.92, 0.94), (1.0, 1.0, 1.0))
    assert row["mean"] == pytest.approx(0.92)
    assert row["spread"] == pytest.approx(0.04)


def test_the_worst_seeds_agreement_decides_and_fewer_images_break_ties(rows):
    best = best_row(rows)
    assert (best["observer"], best["calibration_images"]) == ("percentile", 32)
    assert min(best["accuracies"]) < min(rows[0]["accuracies"])  # which is not what counts


def test_table_names_the_choice(rows):
    text = format_study(rows, fp32_accuracy=0.93)
    assert text.splitlines()[-1] == "most like FP32 at its worst: percentile on 32 images"
    assert max(map(len, text.splitlines())) <= 80
