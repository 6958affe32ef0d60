"""Results of the search over many layers: for each method, its sparsest network, measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.command import cli
from common.measure.evaluate import Paired, compare
from common.report.results import format_change
from common.search.trials import Trial
from pruning.together.allocation import SENSITIVITY
from pruning.together.recalibration import RECALIBRATION_IMAGES, recalibrate_batch_norm
from pruning.together.search import CURVE, Method, ModelSearch
from training.loop.distillation import Training, distill

# Losses on the curve are large or none, so fewer images are enough.
CURVE_IMAGES = 2000
# Learning rate after pruning, which does more harm than removing channels and repairing does. At
# 1/16 of the weights, 9,600 images reduced a loss of 15.0 points (on 4,000 test images) to 4.9 at a
# rate of 0.00005, and to 3.9 at this one.
SPARSE_RATE = 0.0003


@dataclass(frozen=True, eq=False)
class Found:
    """A method's sparsest network within the tolerance."""

    method: Method  # method of the search
    finetune_epochs: int  # epochs of training after pruning; 0 for none
    sparsity: float  # largest within the tolerance; 0 if there is none
    model: nn.Module  # network of that sparsity
    # Correctness of the network on all held-out images: bool, shape (N,), on the CPU.
    correct: torch.Tensor
    # Results by sparsity, on the first ``CURVE_IMAGES`` held-out images.
    points: Mapping[float, Paired]
    trials: Sequence[Trial]  # trials of the search, in order


def search_all(search: ModelSearch) -> list[Found]:
    """Search without and, if there are images for it, with batch norms re-estimated."""
    found = []
    for recalibrated in (False,) if search.calibration is None else (False, True):
        method = Method(SENSITIVITY, recalibrated)
        found.append(search_with(search, method))
        comparison = compare(search.held_out.dense_correct, found[-1].correct)
        cli.log.info(
            "%s%s: %.1f %% of the weights can go, %s on held-out images", method.allocation,
            ", batch norms re-estimated" * recalibrated, 100 * found[-1].sparsity,
            format_change(comparison.as_dict())[0],
        )  # fmt: skip
    return found


def search_with(search: ModelSearch, method: Method) -> Found:
    """Search with one method and measure it on the held-out half."""
    sparsity, trials = search.find_largest(method)
    points = {at: _measure_point(search, search.prune(method, at)) for at in CURVE}
    model = search.prune(method, sparsity)
    correct = search.classifier(model)(search.held_out.images)
    return Found(method, 0, sparsity, model, correct, points, trials)


def _measure_point(search: ModelSearch, model: nn.Module) -> Paired:
    split = search.held_out.first(CURVE_IMAGES)
    return Paired.of(split.dense_correct, search.classifier(model)(split.images))


def best_of(search: ModelSearch, found: Sequence[Found]) -> Found:
    """Return the sparsest network; of several, the most accurate on the images that choose."""
    largest = max(one.sparsity for one in found)
    equals = [one for one in found if one.sparsity == largest]
    if len(equals) == 1:
        return equals[0]
    images = search.budget.choosing.images
    return max(equals, key=lambda one: int(search.classifier(one.model)(images).sum()))


def finetune(model: nn.Module, dense: nn.Module, training: Training, seed: int) -> None:
    """Train a pruned model in place to imitate the dense one; its zeros stay zeros.

    Training keeps the statistics of batch norms, so they are re-estimated first.
    """
    recalibrate_batch_norm(model, training.images.rows(slice(RECALIBRATION_IMAGES)))
    distill(model, dense, training, seed, SPARSE_RATE)


def search_finetuned(search: ModelSearch, best: Found, training: Training) -> Found:
    """Train at ``best``'s sparsity, then at higher ones until one exceeds the tolerance.

    Each network starts from the dense weights, pruned in one step, and learns from the dense
    network. If not even the first is within the tolerance, nothing can be pruned.
    """
    largest, sparsest, points, trials = 0.0, search.model, {}, []
    for sparsity in sorted(s for s in {best.sparsity, *CURVE} if s > 0 and s >= best.sparsity):
        model = search.prune(best.method, sparsity)
        finetune(model, search.model, training, search.seed)
        trials.append(Trial(1 / (1 - sparsity), search.judge(model)))
        points[sparsity] = _measure_point(search, model)
        if not trials[-1].verdict.passes:
            break
        largest, sparsest = sparsity, model
    correct = search.classifier(sparsest)(search.held_out.images)
    return Found(best.method, training.epochs, largest, sparsest, correct, points, trials)
