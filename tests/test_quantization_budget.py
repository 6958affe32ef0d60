"""The accuracy budget: what is tried, kept and given up, against scripted and real drops."""

from __future__ import annotations

import pytest

from quantization.accuracy import budget
from quantization.settings import OBSERVERS, Settings


class ScriptedTrial:
    """Answers with given drops in turn, instead of quantizing."""

    def __init__(self, drops, drop_by_layers=None):
        self.drops = iter(drops)
        self.drop_by_layers = drop_by_layers or {}
        self.bench = self  # which calibrates
        self.calibration, self.batch_size = None, 8

    def measure_drop(self, model, settings):
        return next(self.drops)

    def calibrate(self, model, settings):
        return "observed"

    def measure_drop_of(self, observed, settings):
        return self.drop_by_layers[settings.fp32_layers]


@pytest.fixture(autouse=True)
def _no_real_work(monkeypatch):
    monkeypatch.setattr(budget.corrections, "equalize_cross_layer", lambda model: "equalized")
    monkeypatch.setattr(budget.corrections, "correct_biases", lambda model, *_: f"{model}, biased")
    monkeypatch.setattr(budget.conversion, "reuse_ranges", lambda observed, *_: observed)
    monkeypatch.setattr(budget, "rank_layers", lambda *_: ["worst", "bad", "fine"])


def test_plain_int8_within_the_budget_is_left_alone():
    plan = budget.meet_budget(ScriptedTrial([0.001]), "model", Settings(), 0.001)
    assert plan.model == "model"
    assert plan.settings == Settings()
    assert [step.action for step in plan.steps] == ["plain"]


def test_what_does_not_help_is_not_kept():
    # Plain, equalise, three other observers, biases: two observers help, the second one more.
    drops = [0.05, 0.05, 0.04, 0.03, 0.04, 0.03]
    layers = {("worst",): 0.02, ("worst", "bad"): 0.0, ("bad",): 0.02}
    trial = ScriptedTrial(drops, layers)
    plan = budget.meet_budget(trial, "model", Settings(), 0.01)
    assert plan.model == "model"
    assert plan.settings.observer == OBSERVERS[2]
    assert plan.settings.fp32_layers == ("worst", "bad")
    assert plan.drop == 0.0
    kept = [step.action for step in plan.steps if step.kept]
    assert kept == ["plain", f"{plan.settings.observer} observer", "worst in FP32", "bad in FP32"]


def test_stops_at_the_first_correction_that_suffices():
    plan = budget.meet_budget(ScriptedTrial([0.5, 0.0]), "model", Settings(), 0.0)
    assert plan.model == "equalized"
    assert len(plan.steps) == 2


def test_a_layer_that_turns_out_needless_goes_back_to_int8_and_the_table_says_so():
    # The worst alone does not help, both suffice, and the second alone suffices too.
    layers = {("worst",): 0.05, ("worst", "bad"): 0.0, ("bad",): 0.005}
    plan = budget.meet_budget(ScriptedTrial([0.05] * 6, layers), "model", Settings(), 0.01)
    assert plan.settings.fp32_layers == ("bad",)
    assert plan.drop == 0.005
    assert [(step.action, step.kept) for step in plan.steps[-3:]] == [
        ("worst in FP32", False), ("bad in FP32", True), ("worst in INT8 again", True),
    ]  # fmt: skip


def test_a_layer_that_only_helps_together_reads_as_kept():
    layers = {("worst",): 0.05, ("worst", "bad"): 0.0, ("bad",): 0.04}
    plan = budget.meet_budget(ScriptedTrial([0.05] * 6, layers), "model", Settings(), 0.01)
    assert plan.settings.fp32_layers == ("worst", "bad")
    kept = {step.action for step in plan.steps if step.kept}
    assert kept == {"plain", "worst in FP32", "bad in FP32"}


def test_an_unreachable_budget_gives_the_best_plan():
    layers = {("worst",): 0.3, ("worst", "bad"): 0.2, ("bad",): 0.3}
    plan = budget.meet_budget(ScriptedTrial([0.4] * 6, layers), "model", Settings(), 0.1)
    assert plan.drop == 0.2
    assert plan.settings.fp32_layers == ("worst", "bad")  # the last layer is never given up
