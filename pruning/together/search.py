"""How far many layers can be pruned together: the largest sparsity within the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from common.images.data import ImageSet
from common.measure.budget import Budget
from common.network.cascade import Classifier, Fp32Recheck
from common.network.tracing import trace_network, weight_layers
from pruning.alone.scan import Scan
from pruning.masks import copy_without
from pruning.together.allocation import (
    GLOBAL,
    NORM,
    RANDOM,
    SENSITIVITY,
    DamageCurve,
    Masks,
    global_masks,
    random_masks,
    sensitivity_masks,
    weights_in_scope,
)
from pruning.together.damage import measure_damage
from pruning.together.held_out import EvaluationSplit, split_test
from pruning.together.recalibration import recalibrate_batch_norm

COMPRESSIONS = (2, 4, 8, 16, 32)
# Sparsities are searched in steps of 1/256, up to one weight kept in 64.
LEVELS, LARGEST_LEVEL = 256, 252
COARSE_LEVELS = tuple(LEVELS - LEVELS // times for times in reversed(COMPRESSIONS))
DAMAGE_IMAGES = 500
# A step of the search evaluates this many images at a time, and stops once its outcome is clear.
CHUNK_IMAGES = 250
# Allocations to compare with: random pruning, and channels by norm alone.
CONTROLS = (RANDOM, NORM)
CLEAR_ERRORS = 4.0


@dataclass(frozen=True)
class Method:
    """An allocation, with or without batch-norm statistics re-estimated after pruning."""

    allocation: str
    recalibrated: bool


@dataclass(frozen=True)
class SparsityStep:
    """One step of the search.

    Attributes:
        sparsity: Sparsity that was tried.
        images: Number of images that were evaluated.
        correct: Number of them that were classified correctly.
        kept: Whether that is within the tolerance.
    """

    sparsity: float
    images: int
    correct: int
    kept: bool


def largest_level(is_kept: Callable[[int], bool], coarse: Iterable[int], highest: int) -> int:
    """Find the largest level that is kept: try the ``coarse`` ones downwards, then bisect.

    The search starts from above because a rejection costs few images, and because accuracy need not
    fall steadily: one unlucky step can send a bisection from the middle the wrong way.

    Args:
        is_kept: Returns whether a level is kept. Level 0, nothing pruned, is taken to be kept
            unless it is a coarse one.
        coarse: Levels from largest to smallest.
        highest: Largest level.
    """
    high = highest
    for low in coarse:
        if is_kept(low):
            break
        high = low - 1
    else:
        low = 0
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if is_kept(level) else (low, level - 1)
    return low


@dataclass
class ModelSearch:
    """The search over one checkpoint.

    Attributes:
        unit: Name of what sparsity counts.
        levels: Number of steps from no sparsity to all.
        coarse: Levels to begin with, from largest to smallest; the curve is measured at these.
        highest: Largest level.
        model: Dense network, on the images' device; not changed.
        scope: Layers that may be pruned: ``linear``, ``conv`` or ``all``.
        chosen: Images that choices are made on.
        held_out: Images that results are measured on.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Seed of random pruning.
        fast: Classify in bf16 first.
        calibration: Training images for batch-norm statistics; None to keep the statistics.
        record: Counts of what FP32 checked.
    """

    unit, levels, coarse, highest = "weights", LEVELS, COARSE_LEVELS, LARGEST_LEVEL

    model: nn.Module
    scope: str
    chosen: EvaluationSplit
    held_out: EvaluationSplit
    tolerance: float
    seed: int
    fast: bool
    calibration: ImageSet | None = None
    record: Fp32Recheck = field(default_factory=Fp32Recheck)
    _found: dict[Method, tuple[float, list[SparsityStep]]] = field(default_factory=dict)
    _damage: dict[bool, dict[str, DamageCurve]] = field(default_factory=dict)

    def __post_init__(self):
        network = trace_network(self.model, self.chosen.images.shape)
        layers = weight_layers(self.model, network)
        weights = {name: module.weight.detach() for name, module in layers.items()}
        self.weights = weights_in_scope(network, weights, self.scope)

    @classmethod
    def prepare(
        cls, scan: Scan, dense_correct: torch.Tensor, scope: str, tolerance: float, seed: int,
        calibration: ImageSet | None = None, **options: object,
    ) -> ModelSearch:  # fmt: skip
        """Split the scan's images; ``dense_correct`` is the correctness of its model on them."""
        chosen, held_out = split_test(scan.images, dense_correct, seed)
        return cls(
            scan.model, scope, chosen, held_out, tolerance, seed, scan.fast, calibration, **options
        )

    @property
    def curve(self) -> list[float]:
        """The sparsities to measure every method at."""
        return [level / self.levels for level in reversed(self.coarse)]

    @property
    def is_given(self) -> bool:
        """Whether the sparsity is given and not searched."""
        return False

    def methods(self) -> list[Method]:
        """Return the methods to search with, the control last."""
        recalibrated = [Method(SENSITIVITY, True)] if self.calibration is not None else []
        return [Method(SENSITIVITY, False), *recalibrated, Method(RANDOM, False)]

    def masks(self, method: Method, sparsity: float) -> Masks:
        """Return the masks of the weights that ``method`` keeps at a sparsity."""
        if method.allocation == GLOBAL:
            return global_masks(self.weights, sparsity)
        if method.allocation == RANDOM:
            return random_masks(self.weights, sparsity, self.seed)
        if method.allocation == SENSITIVITY:
            return sensitivity_masks(self.weights, self._curves(method.recalibrated), sparsity)
        raise ValueError(f"no allocation {method.allocation}")

    def prune(self, method: Method, sparsity: float) -> nn.Module:
        """Return a pruned copy, its batch norms re-estimated if the method says so."""
        device = self.chosen.images.images.device
        pruned = copy_without(self.model, self.masks(method, sparsity)).to(device)
        if method.recalibrated and sparsity > 0:  # where nothing goes it is the dense one
            recalibrate_batch_norm(pruned, self.calibration)
        return pruned

    def find_largest(self, method: Method) -> tuple[float, list[SparsityStep]]:
        """Return the largest sparsity within the tolerance, and the steps that led to it."""
        if method not in self._found:
            steps: list[SparsityStep] = []

            def is_kept(level: int) -> bool:
                sparsity = level / self.levels
                steps.append(self.judge(self.prune(method, sparsity), sparsity))
                return steps[-1].kept

            found = largest_level(is_kept, self.coarse, self.highest)
            self._found[method] = (found / self.levels, steps)
        return self._found[method]

    def classifier(self, model: nn.Module) -> Classifier:
        """Return the classifier of a pruned model."""
        network = trace_network(model, self.chosen.images.shape)
        return Classifier(network, self.chosen.images, self.fast, self.record)

    def judge(self, model: nn.Module, sparsity: float) -> SparsityStep:
        """Decide on the images to choose on whether a model, pruned by ``sparsity``, is kept."""
        budget = Budget(self.tolerance, self.chosen.images, self.chosen.dense_correct)
        count = len(budget.images)
        looks = [*range(CHUNK_IMAGES, count, CHUNK_IMAGES), count]
        classifier = self.classifier(model)
        verdict = budget.judge(classifier.find_correct, looks, CLEAR_ERRORS, CLEAR_ERRORS)
        return SparsityStep(sparsity, verdict.shown, verdict.accuracy.correct, verdict.passes)

    def _curves(self, recalibrated: bool) -> dict[str, DamageCurve]:
        """Measure the layers' damage in the network that global pruning leaves at its limit."""
        if recalibrated not in self._damage:
            around = Method(GLOBAL, recalibrated)
            context = self.prune(around, self.find_largest(around)[0])
            images = self.chosen.images.rows(slice(DAMAGE_IMAGES))
            self._damage[recalibrated] = measure_damage(
                self.model, context, self.weights, images, self.fast
            )
        return self._damage[recalibrated]
