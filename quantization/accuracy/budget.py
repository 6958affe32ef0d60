"""Keep the accuracy that INT8 costs within a budget.

What costs nothing at run time comes first: another observer, equalised channels, corrected biases,
each kept only if it helps. Then layers go back to FP32, worst first, until the budget holds; and of
these, each that turns out not to be needed goes back to INT8. All of this is decided on training
images that were not used for calibration; the test images are for the report alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch.fx import GraphModule

from common.command import cli
from common.measure import evaluate
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
        drop: On held-out training images, with it.
        kept: Whether it is so in the model that was written.
    """

    action: str
    drop: float
    kept: bool


@dataclass(frozen=True)
class Plan:
    """How to quantize within the budget.

    Attributes:
        model: FP32 weights to quantize, perhaps corrected.
        settings: Of the quantization.
        drop: On the held-out training images.
        steps: What was tried, in order.
    """

    model: ResNet18
    settings: Settings
    drop: float
    steps: list[Step] = field(default_factory=list)


class Trial:
    """Measures plans against the FP32 model: ``bench`` has the held-out images that decide."""

    def __init__(self, model: ResNet18, bench: Bench):
        self.bench = bench
        dense = bench.predict(model, "evaluate FP32 on held-out images")
        self._dense_correct = dense == bench.images.labels

    def measure_drop(self, model: ResNet18, settings: Settings) -> float:
        """Return the accuracy that ``model`` loses in INT8, as a fraction of held-out images."""
        return self.measure_drop_of(self.bench.calibrate(model, settings), settings)

    def measure_drop_of(self, observed: GraphModule, settings: Settings) -> float:
        """Return the same for a model that is calibrated already."""
        converted = conversion.convert(observed, settings)
        with quiet_torch(settings.engine):
            correct = self.bench.predict(converted, "try") == self.bench.images.labels
        return evaluate.compare(self._dense_correct, correct).drop


def meet_budget(trial: Trial, model: ResNet18, settings: Settings, max_drop: float) -> Plan:
    """Find a plan whose drop on the held-out images is at most ``max_drop``, or the best one.

    It begins with the FP32 ``model`` and ``settings``. The first plan within the budget is taken;
    if there is none, the one with the least drop.
    """
    plan = Plan(model, settings, trial.measure_drop(model, settings))
    plan.steps.append(Step("plain", plan.drop, True))
    plan = _try_free_corrections(trial, plan, max_drop)
    if plan.drop > max_drop:
        plan = _restore_layers(trial, plan, max_drop)
    return plan


def _try_free_corrections(trial: Trial, plan: Plan, max_drop: float) -> Plan:
    for alternatives in _free_corrections(trial.bench, plan.settings):
        for action, correct in alternatives.items():
            if plan.drop <= max_drop:
                return plan
            tried = correct(plan)
            drop = trial.measure_drop(tried.model, tried.settings)
            better, steps = drop < plan.drop, plan.steps
            cli.log.info(
                "budget: %s: drop %.2f points on held-out images%s",
                action, 100 * drop, "" if better else ", not kept",
            )  # fmt: skip
            if better:
                steps = [
                    s if s.action not in alternatives else replace(s, kept=False) for s in steps
                ]
                plan = replace(tried, drop=drop)
            plan = replace(plan, steps=[*steps, Step(action, drop, better)])
    return plan


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


def _restore_layers(trial: Trial, plan: Plan, max_drop: float) -> Plan:
    """Return layers to FP32, worst first, and to INT8 again what need not be; one stays in INT8."""
    observed = trial.bench.calibrate(plan.model, plan.settings)
    ranking = tuple(rank_layers(plan.model, observed, trial.bench.calibration))

    def measure(layers: tuple[str, ...]) -> float:
        settings = replace(plan.settings, fp32_layers=layers)
        return trial.measure_drop_of(
            conversion.reuse_ranges(observed, plan.model, settings), settings
        )

    restored, drop, tried = (), plan.drop, []
    for count, layer in enumerate(ranking[:-1], 1):
        tried.append((layer, measure(ranking[:count])))
        cli.log.info("budget: %s in FP32: drop %.2f points", layer, 100 * tried[-1][1])
        if tried[-1][1] < drop:
            restored, drop = ranking[:count], tried[-1][1]
        if drop <= max_drop:
            break
    undone = []
    for layer in reversed(restored[:-1]):  # the last one was needed: it made the drop what it is
        fewer = tuple(name for name in restored if name != layer)
        without = measure(fewer)
        needless = without <= max(drop, max_drop)
        if needless:
            restored, drop = fewer, without
        undone.append(Step(f"{layer} in INT8 again", without, needless))
    steps = [Step(f"{layer} in FP32", value, layer in restored) for layer, value in tried]
    settings = replace(plan.settings, fp32_layers=restored)
    return Plan(plan.model, settings, drop, [*plan.steps, *steps, *undone])
