"""Keep the accuracy that INT8 costs within a budget.

What costs nothing at run time comes first: another observer, equalised channels, corrected biases,
each kept only if it helps. Then layers go back to FP32, worst first, until the budget holds; those
that turn out not to be needed go back to INT8. All of this is decided on training images that were
not used for calibration, by the rule of :mod:`common.search.budget`.
"""

from dataclasses import dataclass, replace
from functools import partial

from common.command import cli
from common.network.execution import Network
from common.search.budget import Budget, EvaluationSplit, Verdict
from quantization.accuracy import corrections
from quantization.accuracy.diagnosis import rank_layers
from quantization.int8 import engines
from quantization.int8.conversion import Observation, convert
from quantization.settings import OBSERVERS, Settings
from quantization.steps import CalibrationSetup


@dataclass(frozen=True)
class Attempt:
    """One thing that was tried on top of what was kept before it."""

    action: str  # description for the user
    drop: float  # accuracy lost on the held-out training images, as a fraction
    spare: float  # what is left of the budget after this loss and one standard error
    kept: bool  # whether the model that was written has it

    @classmethod
    def of(cls, action: str, verdict: Verdict, kept: bool) -> "Attempt":
        """Return the attempt with the numbers of its verdict."""
        return cls(action, verdict.comparison.drop, verdict.spare, kept)


@dataclass(frozen=True)
class Plan:
    """How to quantize within the budget."""

    network: Network  # FP32 network to quantize, perhaps corrected
    settings: Settings  # settings to quantize it with
    verdict: Verdict  # verdict on the held-out training images
    steps: list[Attempt]  # attempts in order


class HeldOutEvaluator:
    """Judges plans against the FP32 network; the images of the ``setup`` are held out."""

    def __init__(self, network: Network, setup: CalibrationSetup, max_drop: float):
        self.setup = setup
        dense = setup.predict(network, "evaluate FP32 on held-out images")
        choosing = EvaluationSplit(setup.images, dense == setup.images.labels)
        self._budget = Budget(max_drop, choosing)

    def judge(self, network: Network, settings: Settings) -> Verdict:
        """Return the verdict on a network in INT8."""
        return self.judge_observed(self.setup.observe(network, settings), settings)

    def judge_observed(self, observation: Observation, settings: Settings) -> Verdict:
        """Return the verdict on a network whose values were observed before."""
        run = engines.runner(settings.engine, convert(observation, settings))
        return self._budget.judge(
            lambda images: replace(self.setup, images=images).predict(run, "try") == images.labels,
            stop_early=False,
        )


def meet_budget(evaluator: HeldOutEvaluator, network: Network, settings: Settings) -> Plan:
    """Return the first plan that holds the budget, or the one that comes closest to it."""
    verdict = evaluator.judge(network, settings)
    plan = Plan(network, settings, verdict, [Attempt.of("plain", verdict, True)])
    plan = _try_free_corrections(evaluator, plan)
    return plan if plan.verdict.passes else _restore_layers(evaluator, plan)


def _try_free_corrections(evaluator: HeldOutEvaluator, plan: Plan) -> Plan:
    """Try corrections in turn, of which alternatives replace each other; keep what helps."""
    setup = evaluator.setup

    def equalize(plan: Plan) -> Plan:
        return replace(plan, network=corrections.equalize_cross_layer(plan.network))

    def observe(observer: str, plan: Plan) -> Plan:
        return replace(plan, settings=replace(plan.settings, observer=observer))

    def correct_biases(plan: Plan) -> Plan:
        network = corrections.correct_biases(plan.network, setup.calibration, setup.batch_size)
        return replace(plan, network=network)

    observers = [observer for observer in OBSERVERS if observer != plan.settings.observer]
    for alternatives in (
        {"equalise channels across layers": equalize},
        {f"{observer} observer": partial(observe, observer) for observer in observers},
        {"correct biases": correct_biases},
    ):
        for action, correct in alternatives.items():
            if plan.verdict.passes:
                return plan
            tried = correct(plan)
            verdict = evaluator.judge(tried.network, tried.settings)
            better, steps = verdict.spare > plan.verdict.spare, plan.steps
            _log(action, verdict, "" if better else ", not kept")
            if better:
                steps = [replace(s, kept=s.kept and s.action not in alternatives) for s in steps]
                plan = replace(tried, verdict=verdict)
            plan = replace(plan, steps=[*steps, Attempt.of(action, verdict, better)])
    return plan


def _log(action: str, verdict: Verdict, ending: str = "") -> None:
    cli.log.info(
        "budget: %s: drop %.2f points on held-out images, %+.2f to spare%s",
        action, 100 * verdict.comparison.drop, 100 * verdict.spare, ending,
    )  # fmt: skip


def _restore_layers(evaluator: HeldOutEvaluator, plan: Plan) -> Plan:
    """Return layers to FP32, worst first, then those not needed to INT8; one stays in INT8."""
    observation = evaluator.setup.observe(plan.network, plan.settings)
    ranking = tuple(rank_layers(observation, plan.settings.reduce_range))

    def judge(layers: tuple[str, ...]) -> Verdict:
        return evaluator.judge_observed(observation, replace(plan.settings, fp32_layers=layers))

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
        undone.append(Attempt.of(f"{layer} in INT8 again", verdict, needless))
    steps = [Attempt.of(action, verdict, layer in restored) for action, layer, verdict in tried]
    settings = replace(plan.settings, fp32_layers=restored)
    return Plan(plan.network, settings, best, [*plan.steps, *steps, *undone])
