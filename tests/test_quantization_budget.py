"""The accuracy budget: what is tried, kept and given up, against scripted and real drops."""

from __future__ import annotations

import pytest
import torch
from cifar import image_set
from torch import nn

from common.measure.evaluate import Accuracy, Comparison
from common.search.budget import Verdict
from quantization.accuracy import budget
from quantization.settings import OBSERVERS, Settings
from quantization.steps import CalibrationSetup


class ScriptedEvaluator:
    """Answers with given drops in turn, instead of quantizing; no standard error is needed."""

    def __init__(self, drops, max_drop, drop_by_layers=None):
        self.drops, self.max_drop = iter(drops), max_drop
        self.drop_by_layers = drop_by_layers or {}
        self.setup = self  # which observes
        self.calibration, self.batch_size = None, 8

    def judge(self, network, settings):
        return self.verdict(next(self.drops))

    def observe(self, network, settings):
        return "observed"

    def judge_observed(self, observation, settings):
        return self.verdict(self.drop_by_layers[settings.fp32_layers])

    def verdict(self, drop):
        comparison = Comparison(drop, (drop, drop), 1.0, 0, 0)
        return Verdict(Accuracy(0, 1000), comparison, self.max_drop - drop)


@pytest.fixture(autouse=True)
def _no_real_work(monkeypatch):
    monkeypatch.setattr(budget.corrections, "equalize_cross_layer", lambda network: "equalized")
    monkeypatch.setattr(
        budget.corrections, "correct_biases", lambda network, *_: f"{network}, biased"
    )
    monkeypatch.setattr(budget, "rank_layers", lambda *_: ["worst", "bad", "fine"])


def test_plain_int8_within_the_budget_is_left_alone():
    plan = budget.meet_budget(ScriptedEvaluator([0.001], 0.001), "network", Settings())
    assert plan.network == "network"
    assert plan.settings == Settings()
    assert [step.action for step in plan.steps] == ["plain"]


def test_what_does_not_help_is_not_kept():
    # Plain, equalise, three other observers, biases: two observers help, the second one more.
    drops = [0.05, 0.05, 0.04, 0.03, 0.04, 0.03]
    layers = {("worst",): 0.02, ("worst", "bad"): 0.0, ("bad",): 0.02}
    evaluator = ScriptedEvaluator(drops, 0.01, layers)
    plan = budget.meet_budget(evaluator, "network", Settings())
    assert plan.network == "network"
    assert plan.settings.observer == OBSERVERS[2]
    assert plan.settings.fp32_layers == ("worst", "bad")
    assert plan.verdict.comparison.drop == 0.0
    kept = [step.action for step in plan.steps if step.kept]
    assert kept == ["plain", f"{plan.settings.observer} observer", "worst in FP32", "bad in FP32"]


def test_stops_at_the_first_correction_that_suffices():
    plan = budget.meet_budget(ScriptedEvaluator([0.5, 0.0], 0.0), "network", Settings())
    assert plan.network == "equalized"
    assert len(plan.steps) == 2


def test_a_layer_that_turns_out_needless_goes_back_to_int8_and_the_table_says_so():
    # The worst alone does not help, both suffice, and the second alone suffices too.
    layers = {("worst",): 0.05, ("worst", "bad"): 0.0, ("bad",): 0.005}
    plan = budget.meet_budget(ScriptedEvaluator([0.05] * 6, 0.01, layers), "network", Settings())
    assert plan.settings.fp32_layers == ("bad",)
    assert plan.verdict.comparison.drop == 0.005
    assert [(step.action, step.kept) for step in plan.steps[-3:]] == [
        ("worst in FP32", False), ("bad in FP32", True), ("worst in INT8 again", True),
    ]  # fmt: skip


def test_a_layer_that_only_helps_together_reads_as_kept():
    layers = {("worst",): 0.05, ("worst", "bad"): 0.0, ("bad",): 0.04}
    plan = budget.meet_budget(ScriptedEvaluator([0.05] * 6, 0.01, layers), "network", Settings())
    assert plan.settings.fp32_layers == ("worst", "bad")
    kept = {step.action for step in plan.steps if step.kept}
    assert kept == {"plain", "worst in FP32", "bad in FP32"}


def test_an_unreachable_budget_gives_the_best_plan():
    layers = {("worst",): 0.3, ("worst", "bad"): 0.2, ("bad",): 0.3}
    plan = budget.meet_budget(ScriptedEvaluator([0.4] * 6, 0.1, layers), "network", Settings())
    assert plan.verdict.comparison.drop == 0.2
    assert plan.settings.fp32_layers == ("worst", "bad")  # the last layer is never given up


class ReadsLabels(nn.Module):
    """Reads labels off the images' brightness."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].round().long() % 10, 10).float()


@pytest.mark.parametrize(("max_drop", "passes"), [(0.0105, False), (0.0132, True)])
def test_int8_must_leave_a_standard_error(monkeypatch, max_drop, passes):
    """10 of 1,000 images lost: 1 point, and a standard error of 0.31 points."""
    labels = torch.arange(1000) % 10
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    images = image_set(pixels, labels, mean=(0.0,) * 3, std=(1 / 255,) * 3)

    class LosesTen(ReadsLabels):
        seen = 0

        def forward(self, images):
            logits = super().forward(images)
            if self.seen == 0:
                logits[:10] = logits[:10].roll(1, 1)
            self.seen += len(images)
            return logits

    monkeypatch.setattr(budget, "convert", lambda observation, settings: observation)
    monkeypatch.setattr(budget.engines, "runner", lambda engine, network: network)
    setup = CalibrationSetup(images, images, 100)
    evaluator = budget.HeldOutEvaluator(ReadsLabels(), setup, max_drop)
    verdict = evaluator.judge_observed(LosesTen(), Settings())
    assert verdict.comparison.drop == pytest.approx(0.01)
    assert verdict.accuracy.total == 1000
    assert verdict.passes == passes
