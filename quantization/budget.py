"""Keep the accuracy that INT8 costs within a budget.

What costs nothing at run time comes first: another observer, equalised channels, corrected biases,
each kept only if it helps. Then layers go back to FP32, worst first, until the budget holds. All
of this is decided on training images that were not used for calibration; the test images are for
the report alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from common import cli, evaluate
from common.data import Cifar10, batches
from common.model import ResNet18
from common.workers import ALONE, Workers
from quantization import conversion, corrections
from quantization.diagnosis import rank_layers
from quantization.settings import OBSERVERS, Settings


@dataclass(frozen=True)
class Step:
    """One thing that was tried: the drop on held-out training images, and whether it was kept."""

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
    """Measures plans on held-out images, against the FP32 model.

    Args:
        model: FP32.
        calibration: Images that set ranges.
        held_out: Images that decide; none of the calibration images.
        batch_size: In images.
        workers: Share the held-out images, and so come to the same decisions.
    """

    def __init__(
        self,
        model: ResNet18,
        calibration: Cifar10,
        held_out: Cifar10,
        batch_size: int,
        workers: Workers = ALONE,
    ):
        self.calibration = calibration
        self.batch_size = batch_size
        self._held_out = held_out
        self._workers = workers
        description = "evaluate FP32 on held-out images"
        dense = evaluate.predict(model, held_out, batch_size, description, workers)
        self._dense_correct = dense == held_out.labels

    def calibrate(self, model: ResNet18, settings: Settings) -> GraphModule:
        """Return ``model`` with its activations observed on the calibration images."""
        return conversion.calibrate(model, batches(self.calibration, self.batch_size), settings)

    def measure_drop(self, model: ResNet18, settings: Settings) -> float:
        """Return the accuracy that ``model`` loses in INT8, as a fraction of held-out images."""
        return self.measure_drop_of(self.calibrate(model, settings), settings)

    def measure_drop_of(self, observed: GraphModule, settings: Settings) -> float:
        """Return the same for a model that is calibrated already."""
        converted = conversion.convert(observed, settings)
        predictions = evaluate.predict(
            converted, self._held_out, self.batch_size, "try", self._workers
        )
        correct = predictions == self._held_out.labels
        return evaluate.compare(self._dense_correct, correct).drop


def meet_budget(trial: Trial, model: ResNet18, settings: Settings, max_drop: float) -> Plan:
    """Find a plan whose drop on the held-out images is at most ``max_drop``, or the best one.

    Args:
        trial: Measures drops.
        model: FP32.
        settings: To start from.
        max_drop: As a fraction of images.

    Returns:
        The first plan within the budget; else the one with the least drop.
    """
    plan = Plan(model, settings, trial.measure_drop(model, settings))
    plan.steps.append(Step("plain", plan.drop, True))
    plan = _try_free_corrections(trial, plan, max_drop)
    if plan.drop > max_drop:
        plan = _restore_layers(trial, plan, max_drop)
    return plan


def _try_free_corrections(trial: Trial, plan: Plan, max_drop: float) -> Plan:
    for action, propose in _free_corrections(trial):
        if plan.drop <= max_drop:
            break
        model, settings = propose(plan)
        plan = _keep_if_better(plan, action, model, settings, trial.measure_drop(model, settings))
    return plan


def _free_corrections(
    trial: Trial,
) -> Iterator[tuple[str, Callable[[Plan], tuple[ResNet18, Settings]]]]:
    yield (
        "equalise channels across layers",
        lambda plan: (corrections.equalize_cross_layer(plan.model), plan.settings),
    )
    for observer in OBSERVERS:
        yield (
            f"{observer} observer",
            lambda plan, observer=observer: (plan.model, replace(plan.settings, observer=observer)),
        )
    yield (
        "correct biases",
        lambda plan: (
            corrections.correct_biases(plan.model, trial.calibration, trial.batch_size),
            plan.settings,
        ),
    )


def _restore_layers(trial: Trial, plan: Plan, max_drop: float) -> Plan:
    """Return layers to FP32, worst first; at least one stays in INT8."""
    observed = trial.calibrate(plan.model, plan.settings)
    ranking = rank_layers(plan.model, observed, trial.calibration)
    restored, best = (), plan
    for layer in ranking[:-1]:
        restored = (*restored, layer)
        settings = replace(plan.settings, fp32_layers=restored)
        calibrated = conversion.reuse_ranges(observed, plan.model, settings)
        drop = trial.measure_drop_of(calibrated, settings)
        best = _keep_if_better(best, f"{layer} in FP32", plan.model, settings, drop)
        if best.drop <= max_drop:
            break
    return best


def _keep_if_better(
    plan: Plan, action: str, model: ResNet18, settings: Settings, drop: float
) -> Plan:
    better = drop < plan.drop
    steps = [*plan.steps, Step(action, drop, better)]
    cli.log.info(
        "budget: %s: drop %.2f points on held-out images%s",
        action, 100 * drop, "" if better else ", not kept",
    )  # fmt: skip
    return Plan(model, settings, drop, steps) if better else replace(plan, steps=steps)
