"""How far many layers can be pruned together: the largest sparsity within the tolerance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from common.images.data import ImageSet
from common.network.cascade import SAMPLE_IMAGES, Fp32Recheck, bounds_of, decide
from common.network.execution import Network
from common.network.tracing import trace_network
from common.search.budget import Budget, Verdict, split_test
from common.search.trials import Range, Trial, run_trials, strongest
from pruning.alone.scan import Scan
from pruning.masks import copy_without
from pruning.together import allocation
from pruning.together.recalibration import recalibrate_batch_norm

# Every method is measured at these sparsities, and its limit is searched for near them.
CURVE = tuple(1 - 1 / times for times in (2, 4, 8, 16, 32))
COMPRESSIONS = Range(start=8, least=1.03, most=64, trials=8, stride=2)
DAMAGE_IMAGES = 500
BATCH_SIZE = 50


def make_classifier(
    network: Network, sample: ImageSet, fast: bool, record: Fp32Recheck
) -> Callable[[ImageSet], torch.Tensor]:
    """Return what finds per-image correctness (bool, (N,), on the CPU), as FP32 gives it.

    With ``fast`` the network runs in bf16 first: its error is measured on the ``sample``.
    """
    if fast:
        bf16, images = network.to(torch.bfloat16), sample.rows(slice(SAMPLE_IMAGES))
        bounds = bounds_of(logits_of(bf16, images), logits_of(network, images))

    @torch.inference_mode()
    def find_correct(dataset: ImageSet) -> torch.Tensor:
        def look_again(close: torch.Tensor) -> torch.Tensor:
            # All of them together: full batches run faster than the few of each batch.
            return logits_of(network, dataset.rows(close[0]))[0].argmax(dim=1)

        if fast:
            predictions = decide(logits_of(bf16, dataset), bounds, look_again, record)
        else:
            predictions = logits_of(network, dataset).argmax(dim=2)
        return (predictions[0] == dataset.labels).cpu()

    return find_correct


@torch.inference_mode()
def logits_of(network: Network, dataset: ImageSet) -> torch.Tensor:
    """Return FP32 logits (1, N, classes)."""
    return torch.cat([network(images) for images, _ in dataset.batches(BATCH_SIZE)])[None]


@dataclass(frozen=True)
class Method:
    """An allocation, with or without batch-norm statistics re-estimated after pruning."""

    allocation: str
    recalibrated: bool


class ModelSearch:
    """The search over the checkpoint of a scan, on the images of the scan.

    ``dense_correct`` is the correctness of the scan's model on them. The layers in ``scope``,
    ``linear``, ``conv`` or ``all``, may be pruned, and an accuracy of ``tolerance`` be lost.
    ``calibration`` are training images for batch-norm statistics, None not to measure these.
    """

    def __init__(
        self, scan: Scan, dense_correct: torch.Tensor, scope: str, tolerance: float, seed: int,
        calibration: ImageSet | None = None,
    ):  # fmt: skip
        self.scan, self.scope, self.seed, self.calibration = scan, scope, seed, calibration
        self.model = scan.model  # dense network, on the images' device; not changed
        choosing, self.held_out = split_test(scan.images, dense_correct, seed)
        self.budget = Budget(tolerance, choosing)
        self.weights = allocation.weights_in_scope(scan.network, scan.weights, scope)
        self.record = Fp32Recheck()  # counts of what FP32 checked
        self._damage: dict[bool, dict[str, allocation.DamageCurve]] = {}

    def prune(self, method: Method, sparsity: float) -> nn.Module:
        """Return a pruned copy, its batch norms re-estimated if the method says so."""
        if method.allocation == allocation.GLOBAL:
            masks = allocation.global_masks(self.weights, sparsity)
        else:
            curves = self._curves(method.recalibrated)
            masks = allocation.sensitivity_masks(self.weights, curves, sparsity)
        pruned = copy_without(self.model, masks).to(self.scan.images.images.device)
        if method.recalibrated and sparsity > 0:  # at 0 it is the dense network
            recalibrate_batch_norm(pruned, self.calibration)
        return pruned

    def find_largest(self, method: Method) -> tuple[float, list[Trial]]:
        """Return the largest sparsity within the budget, and all trials, by compression."""

        def attempt(times: float) -> Trial:
            return Trial(times, self.judge(self.prune(method, 1 - 1 / times)))

        trials = run_trials(attempt, COMPRESSIONS)
        best = strongest(trials)
        return 1 - 1 / best.strength if best else 0.0, trials

    def judge(self, model: nn.Module) -> Verdict:
        """Judge a pruned model on the images that choose."""
        return self.budget.judge(self.classifier(model))

    def classifier(self, model: nn.Module) -> Callable[[ImageSet], torch.Tensor]:
        """Return what finds the images that a pruned model classifies correctly."""
        images = self.budget.choosing.images
        network = trace_network(model, images.shape)
        return make_classifier(network, images, self.scan.fast, self.record)

    def _curves(self, recalibrated: bool) -> dict[str, allocation.DamageCurve]:
        """Measure the layers' damage in the network that global pruning leaves at its limit."""
        if recalibrated not in self._damage:
            around = Method(allocation.GLOBAL, recalibrated)
            context = self.prune(around, self.find_largest(around)[0])
            images = self.budget.choosing.first(DAMAGE_IMAGES).images
            self._damage[recalibrated] = allocation.measure_damage(
                self.model, context, self.weights, images, self.scan.fast
            )
        return self._damage[recalibrated]
