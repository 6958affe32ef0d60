"""How far many layers can be pruned together: the largest sparsity within the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from common.images.data import ImageSet
from common.measure.budget import Budget
from common.network.cascade import Classifier, Recomputation
from common.network.resnet import ResNet18
from pruning.alone.scan import Scan
from pruning.masks import copy_without
from pruning.together.allocation import (
    NORM,
    RANDOM,
    DamageCurve,
    Masks,
    global_masks,
    random_masks,
    sensitivity_masks,
    uniform_masks,
    weights_in_scope,
)
from pruning.together.damage import measure_damage
from pruning.together.held_out import Half, split_test
from pruning.together.recalibration import recalibrate_batch_norm

COMPRESSIONS = (2, 4, 8, 16, 32)
# Sparsities are searched in steps of 1/256, up to one weight kept in 64.
LEVELS, LARGEST_LEVEL = 256, 252
COARSE_LEVELS = tuple(LEVELS - LEVELS // times for times in reversed(COMPRESSIONS))
DAMAGE_IMAGES = 500
# A step of the search looks at this many images at a time, and stops where its outcome is clear.
CHUNK_IMAGES = 250
# Allocations that are only there to compare with: random pruning, and channels by norm alone.
CONTROLS = (RANDOM, NORM)
CLEAR_ERRORS = 4.0


@dataclass(frozen=True)
class Method:
    """An allocation, with or without batch-norm statistics re-estimated after pruning."""

    allocation: str
    recalibrated: bool


@dataclass(frozen=True)
class Step:
    """One step of the search: looked at ``images`` images, ``correct`` of them right; kept?"""

    sparsity: float
    images: int
    correct: int
    kept: bool


def largest_level(is_kept: Callable[[int], bool], coarse: Iterable[int], highest: int) -> int:
    """Find the largest level that is kept: down the ``coarse`` ones, then bisecting.

    From above, since a rejection costs few images, and because accuracy need not fall steadily: a
    bisection from the middle can be sent the wrong way by one unlucky step.

    Args:
        is_kept: Whether a level is; 0, nothing pruned, is taken to be, unless it is a coarse one.
        coarse: Levels from largest to least.
        highest: The largest there is.
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
        unit: What sparsity counts, in words.
        levels: Steps that sparsity is searched in.
        coarse: Levels to begin with, from largest to least; the curve is measured at these.
        highest: The largest level.
        model: Dense, on the images' device; not changed.
        scope: Which layers may be pruned: ``linear``, ``conv`` or ``all``.
        chosen: What the choices are made on.
        held_out: What the results are measured on.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Of random pruning.
        fast: Classify in bf16 first.
        calibration: Training images for batch-norm statistics; None: none are re-estimated.
        record: Of bf16, over all that was classified.
    """

    unit, levels, coarse, highest = "weights", LEVELS, COARSE_LEVELS, LARGEST_LEVEL

    model: ResNet18
    scope: str
    chosen: Half
    held_out: Half
    tolerance: float
    seed: int
    fast: bool
    calibration: ImageSet | None = None
    record: Recomputation = field(default_factory=Recomputation)
    _found: dict[Method, tuple[float, list[Step]]] = field(default_factory=dict)
    _damage: dict[bool, dict[str, DamageCurve]] = field(default_factory=dict)

    def __post_init__(self):
        self.weights = weights_in_scope(self.model, self.scope)

    @classmethod
    def prepare(
        cls, scan: Scan, dense_correct: torch.Tensor, scope: str, tolerance: float, seed: int,
        calibration: ImageSet | None = None, **options: object,
    ) -> ModelSearch:  # fmt: skip
        """Split the scan's images; ``dense_correct`` says which of them its model gets right."""
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
        """Whether the sparsity is asked for, whatever it costs."""
        return False

    def methods(self, allocations: Sequence[str]) -> list[Method]:
        """Return what to search with: allocations, with batch norms re-estimated too; a control."""
        found = [Method(allocation, False) for allocation in allocations]
        if self.calibration is not None:
            found += [Method(allocation, True) for allocation in allocations]
        return [*found, Method(RANDOM, False)]

    def masks(self, method: Method, sparsity: float) -> Masks:
        """Return what ``method`` keeps at a sparsity."""
        if method.allocation == "uniform":
            return uniform_masks(self.weights, sparsity)
        if method.allocation == "global":
            return global_masks(self.weights, sparsity)
        if method.allocation == RANDOM:
            return random_masks(self.weights, sparsity, self.seed)
        if method.allocation == "sensitivity":
            return sensitivity_masks(self.weights, self._curves(method.recalibrated), sparsity)
        raise ValueError(f"no allocation {method.allocation}")

    def prune(self, method: Method, sparsity: float) -> ResNet18:
        """Return a pruned copy, its batch norms re-estimated where the method says so."""
        device = self.chosen.images.images.device
        pruned = copy_without(self.model, self.masks(method, sparsity)).to(device)
        if method.recalibrated and sparsity > 0:  # where nothing goes it is the dense one
            recalibrate_batch_norm(pruned, self.calibration.images)
        return pruned

    def find_largest(self, method: Method) -> tuple[float, list[Step]]:
        """Return the largest sparsity within the tolerance, and the steps that led to it."""
        if method not in self._found:
            steps: list[Step] = []

            def is_kept(level: int) -> bool:
                sparsity = level / self.levels
                steps.append(self.judge(self.prune(method, sparsity), sparsity))
                return steps[-1].kept

            found = largest_level(is_kept, self.coarse, self.highest)
            self._found[method] = (found / self.levels, steps)
        return self._found[method]

    def classifier(self, model: ResNet18) -> Classifier:
        """Return what classifies with a pruned model."""
        return Classifier(model, self.chosen.images.images, self.fast, self.record)

    def judge(self, model: ResNet18, sparsity: float) -> Step:
        """Decide on the half to choose on whether a model, pruned by ``sparsity``, is kept."""
        budget = Budget(self.tolerance, self.chosen.images, self.chosen.dense_correct)
        count = len(budget.images)
        looks = [*range(CHUNK_IMAGES, count, CHUNK_IMAGES), count]
        classifier = self.classifier(model)
        verdict = budget.judge(classifier.find_correct, looks, CLEAR_ERRORS, CLEAR_ERRORS)
        return Step(sparsity, verdict.shown, verdict.accuracy.correct, verdict.passes)

    def _curves(self, recalibrated: bool) -> dict[str, DamageCurve]:
        """Measure the layers' damage around what global pruning leaves at its own limit."""
        if recalibrated not in self._damage:
            around = Method("global", recalibrated)
            context = self.prune(around, self.find_largest(around)[0])
            images = self.chosen.images.images[:DAMAGE_IMAGES]
            self._damage[recalibrated] = measure_damage(
                self.model, context, list(self.weights), images, self.fast
            )
        return self._damage[recalibrated]
