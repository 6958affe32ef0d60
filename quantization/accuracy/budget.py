"""Keep the accuracy that INT8 costs within a budget.

What costs nothing at run time comes first: another observer, equalised channels, corrected biases,
each kept only if it helps. Then layers go back to FP32, worst first, until the budget holds; and of
these, each that turns out not to be needed goes back to INT8. All of this is decided on training
images that were not used for calibration; the test images are for the report alone. A plan holds
the budget if it leaves a standard error to spare: the rule of :mod:`common.measure.budget`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.fx import GraphModule

from common.command import cli
from common.images.data import Cifar10
from common.measure.budget import Budget, Verdict
from common.network.resnet import ResNet18
from quantization.accuracy import corrections
from quantization.accuracy.diagnosis import rank_layers
from quantization.bench import Bench
from quantization.int8 import conversion
from quantization.int8.engines import quiet_torch
from quantization.settings import OBSERVERS, Settings


@dataclass(frozen=True)
class Step:
    """One thing that was tried on top of what was kept before it.

    Attributes:
        action: What was tried.
        drop: Accuracy lost on the held-out training images, as a fraction.
        spare: What it leaves of the budget after this loss and one standard error.
        kept: Whether it is so in the model that was written.
    """

    action: str
    drop: float
    spare: float
    kept: bool

    @classmethod
    def of(cls, action: str, verdict: Verdict, kept: bool) -> Step:
        """Describe what was tried by its verdict."""
        return cls(action, verdict.comparison.drop, verdict.spare, kept)


@dataclass(frozen=True)
class Plan:
    """How to quantize within the budget.

    Attributes:
        model: FP32 weights to quantize, perhaps corrected.
        settings: Of the quantization.
        verdict: On the held-out training images.
        steps: What was tried, in order.
    """

    model: ResNet18
    settings: Settings
    verdict: Verdict
    steps: list[Step] = field(default_factory=list)


class Trial:
    """Judges plans against the FP32 model: ``bench`` has the held-out images that decide."""

    def __init__(self, model: ResNet18, bench: Bench, max_drop: float):
        self.bench = bench
        dense = bench.predict(model, "evaluate FP32 on held-out images")
        self._budget = Budget(max_drop, bench.images, dense == bench.images.labels)

    def judge(self, model: ResNet18, settings: Settings) -> Verdict:
        """Return how ``model`` does in INT8 on the held-out images."""
        return self.judge_calibrated(self.bench.calibrate(model, settings), settings)

    def judge_calibrated(self, observed: GraphModule, settings: Settings) -> Verdict:
        """Return the same for a model that is calibrated already."""
        converted = conversion.convert(observed, settings)

        def find_correct(images: Cifar10) -> torch.Tensor:
            with quiet_torch(settings.engine):
                return replace(self.bench, images=images).predict(converted, "try") == images.labels

        return self._budget.judge(find_correct, looks=[len(self._budget.images)])


def meet_budget(trial: Trial, model: ResNet18, settings: Settings) -> Plan:
    """Find a plan that holds the budget of ``trial``, or the one that comes closest to it.

    It begins with the FP32 ``model`` and ``settings``, and takes the first plan that passes.
    """
    plan = Plan(model, settings, trial.judge(model, settings))
    plan.steps.append(Step.of("plain", plan.verdict, True))
    plan = _try_free_corrections(trial, plan)
    return plan if plan.verdict.passes else _restore_layers(trial, plan)


def _try_free_corrections(trial: Trial, plan: Plan) -> Plan:
    for alternatives in _free_corrections(trial.bench, plan.settings):
        for action, correct in alternatives.items():
            if plan.verdict.passes:
                return plan
            tried = correct(plan)
            verdict = trial.judge(tried.model, tried.settings)
            better, steps = verdict.spare > plan.verdict.spare, plan.steps
            _log(action, verdict, "" if better else ", not kept")
            if better:
                steps = [
                    s if s.action not in alternatives else replace(s, kept=False) for s in steps
                ]
                plan = replace(tried, verdict=verdict)
            plan = replace(plan, steps=[*steps, Step.of(action, verdict, better)])
    return plan


def _log(action: str, verdict: Verdict, ending: str = "") -> None:
    cli.log.info(
        "budget: %s: drop %.2f points on held-out images, %+.2f to spare%s",
        action, 100 * verdict.comparison.drop, 100 * verdict.spare, ending,
    )  # fmt: skip


def _free_corrections(bench: Bench, settings: Settings) -> list[dict[str, Callable[[Plan], Plan]]]:
    """Return what costs no time, in the order in which it is tried; alternatives together."""

    def equalize(plan: Plan) -> Plan:
        return replace(plan, model=corrections.equalize_cross_layer(plan.model))

    def observe(observer: str, plan: Plan) -> Plan:
        return replace(plan, settings=replace(plan.settings, observer=observer))

    def correct_biases(plan: Plan) -> Plan:
        model = corrections.correct_biases(plan.model, bench.calibration, bench.batch_size)
        return replace(plan, model=model)

    observers = [observer for observer in OBSERVERS if observer != settings.observer]
    return [
        {"equalise channels across layers": equalize},
        {f"{observer} observer": partial(observe, observer) for observer in observers},
        {"correct biases": correct_biases},
    ]


def _restore_layers(trial: Trial, plan: Plan) -> Plan:
    """Return layers to FP32, worst first, and to INT8 again what need not be; one stays in INT8."""
    observed = trial.bench.calibrate(plan.model, plan.settings)
    ranking = tuple(rank_layers(plan.model, observed, trial.bench.calibration))

    def judge(layers: tuple[str, ...]) -> Verdict:
        settings = replace(plan.settings, fp32_layers=layers)
        return trial.judge_calibrated(
            conversion.reuse_ranges(observed, plan.model, settings), settings
        )

    restored, best, tried = (), plan.verdict, []
    for count, layer in enumerate(ranking[:-1], 1):
        verdict = judge(ranking[:count])
        tried.append((f"{layer} in FP32", layer, verdict))
        _log(tried[-1][0], verdict)
        if verdict.spare > best.spare:
            restored, best = ranking[:count], verdict
        if best.passes:
            break
    undone = []
    for layer in reversed(restored[:-1]):  # the last one was needed: it made the drop what it is
        fewer = tuple(name for name in restored if name != layer)
        verdict = judge(fewer)
        needless = verdict.passes or verdict.spare >= best.spare
        if needless:
            restored, best = fewer, verdict
        undone.append(Step.of(f"{layer} in INT8 again", verdict, needless))
    steps = [Step.of(action, verdict, layer in restored) for action, layer, verdict in tried]
    settings = replace(plan.settings, fp32_layers=restored)
    return Plan(plan.model, settings, best, [*plan.steps, *steps, *undone])
