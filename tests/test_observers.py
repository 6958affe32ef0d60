"""Observers, against torch.ao's for as long as torch has them, and against their definitions."""

from __future__ import annotations

import warnings

import pytest
import torch

from common.command.cli import UserError
from quantization.int8 import observers
from quantization.settings import OBSERVERS

BATCHES = {
    "normal": lambda batch: torch.randn(4, 8, 10, 10) * (1 + batch),
    "positive": lambda batch: torch.randn(4, 8, 10, 10).relu_(),
    "far outliers": lambda batch: torch.randn(4, 8, 10, 10) ** 5,
    "skewed": lambda batch: torch.randn(4, 8, 10, 10).exp(),
    "moving": lambda batch: torch.rand(4, 8, 10, 10) - 3 + batch,
    "constant, then not": lambda batch: torch.ones(2, 3) if batch == 0 else torch.randn(2, 3),
    "two values": lambda batch: torch.tensor([0.0, 6.0]),
}


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    ("name", "counterpart"),
    [
        ("histogram", "HistogramObserver"),
        ("minmax", "MinMaxObserver"),
        ("moving-average", "MovingAverageMinMaxObserver"),
    ],
)
def test_ranges_are_those_of_torch_ao(name, counterpart, kind, reduce_range):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = pytest.importorskip("torch.ao.quantization.observer")
        quant_max = 127 if reduce_range else 255
        expected = getattr(ao, counterpart)(dtype=torch.quint8, quant_min=0, quant_max=quant_max)
        found = observers.OBSERVERS[name]()
        torch.manual_seed(0)
        for batch in range(4):
            values = BATCHES[kind](batch)
            expected(values)
            found.observe(values)
        scale, zero_point = expected.calculate_qparams()
    chosen = found.choose_range(reduce_range)
    assert chosen.scale == pytest.approx(float(scale), rel=1e-6)
    assert chosen.zero_point == int(zero_point)


def test_every_observer_that_can_be_chosen_is_there():
    assert tuple(observers.OBSERVERS) == OBSERVERS


def test_percentiles_leave_out_a_ten_thousandth_at_each_end():
    values = torch.linspace(0, 1, 100_001)
    values[-1] = 1.9  # within the last bins; minmax would keep it
    observer = observers.PercentileObserver()
    observer.observe(values - 0.5)
    low, high = observer.limits()
    assert low == pytest.approx(-0.5, abs=0.002)
    assert high == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("name", OBSERVERS)
def test_zero_is_always_exact(name):
    observer = observers.OBSERVERS[name]()
    observer.observe(torch.tensor([3.0, 4.0, 5.0]))
    chosen = observer.choose_range(reduce_range=False)
    assert chosen.zero_point == 0
    assert chosen.round(torch.zeros(1)) == 0


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_value_that_never_varies_has_a_range(name, value):
    observer = observers.OBSERVERS[name]()
    observer.observe(torch.full((4,), value))
    chosen = observer.choose_range(reduce_range=False)
    assert chosen.scale > 0
    assert chosen.round(torch.tensor([value])) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told(bad):
    with pytest.raises(UserError, match="NaN or infinite values on calibration images"):
        observers.HistogramObserver().observe(torch.tensor([1.0, bad]))
