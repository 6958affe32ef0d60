"""How far the whole network can be pruned: the largest sparsity within the tolerance, and a curve.

One half of the test images chooses, the other confirms; the two have no image in common. Where an
amount is chosen because its loss is just within the tolerance, new images find it outside as often
as not, so a choice must leave one standard error to spare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common.data import Cifar10
from common.model import ResNet18
from pruning.allocation import (
    RANDOM,
    DamageCurve,
    Masks,
    global_masks,
    random_masks,
    sensitivity_masks,
    uniform_masks,
    weights_in_scope,
)
from pruning.classify import Classifier
from pruning.damage import measure_damage
from pruning.masks import prune_model
from pruning.recalibration import recalibrate_batch_norm

COMPRESSIONS = (2, 4, 8, 16, 32)
# Sparsities are searched in steps of 1/256, up to one weight kept in 64.
LEVELS, LARGEST_LEVEL = 256, 252
DAMAGE_IMAGES = 500
# A step of the search looks at this many images at a time, and stops where its outcome is clear.
CHUNK_IMAGES = 250
CLEAR_ERRORS = 4.0
SPARE_ERRORS = 1.0


@dataclass(frozen=True)
class Half:
    """Some of the test images, and which of them the dense network gets right (bool, CPU)."""

    images: Cifar10
    dense_correct: torch.Tensor

    def first(self, most: int | None) -> Half:
        """Return at most the first ``most`` of them; None for all."""
        return Half(self.images.rows(slice(most)), self.dense_correct[:most])


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


def split_test(test: Cifar10, dense_correct: torch.Tensor, seed: int) -> tuple[Half, Half]:
    """Return the half to choose on and the half to confirm on, each in random order.

    Sorted by class as images may be, the first ones would not speak for the rest.
    """
    positions = Cifar10(torch.arange(len(test)), test.labels.cpu()).split_halves(seed)
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for half in positions:
        rows = half.images[torch.randperm(len(half), generator=generator)]
        halves.append(Half(Cifar10(test.images[rows], test.labels[rows]), dense_correct[rows]))
    return tuple(halves)


def clearance(dense_correct: torch.Tensor, correct: torch.Tensor, tolerance: float) -> float:
    """Return how far the loss is below the tolerance, in standard errors of the paired loss."""
    total = len(correct)
    lost = int((dense_correct & ~correct).sum())
    gained = int((correct & ~dense_correct).sum())
    variance = max(1.0, lost + gained - (lost - gained) ** 2 / total)
    return (tolerance * total - (lost - gained)) / variance**0.5


def largest_level(is_kept: Callable[[int], bool]) -> int:
    """Find the largest level that is kept: down the compressions, then bisecting.

    From above, since a rejection costs few images, and because accuracy need not fall steadily: a
    bisection from the middle can be sent the wrong way by one unlucky step.

    Args:
        is_kept: Whether a level is; 0, nothing pruned, is taken to be.
    """
    high = LARGEST_LEVEL
    for times in reversed(COMPRESSIONS):
        low = LEVELS - LEVELS // times
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
        model: Dense, on the images' device; not changed.
        scope: Which layers may be pruned: ``linear``, ``conv`` or ``all``.
        chosen: What the choices are made on.
        held_out: What the results are measured on.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Of random pruning.
        fast: Classify in bf16 first.
        training: uint8 training images for batch-norm statistics; None: none are re-estimated.
    """

    model: ResNet18
    scope: str
    chosen: Half
    held_out: Half
    tolerance: float
    seed: int
    fast: bool
    training: torch.Tensor | None = None
    _found: dict[Method, tuple[float, list[Step]]] = field(default_factory=dict)
    _damage: dict[bool, dict[str, DamageCurve]] = field(default_factory=dict)

    def __post_init__(self):
        self.weights = weights_in_scope(self.model, self.scope)

    @classmethod
    def prepare(
        cls, model: ResNet18, scope: str, test: Cifar10, dense_correct: torch.Tensor,
        tolerance: float, seed: int, fast: bool,
    ) -> ModelSearch:  # fmt: skip
        """Split the test images; ``dense_correct`` says which of them ``model`` gets right."""
        chosen, held_out = split_test(test, dense_correct, seed)
        return cls(model, scope, chosen, held_out, tolerance, seed, fast)

    def masks(self, method: Method, sparsity: float) -> Masks:
        """Return what ``method`` keeps at a sparsity."""
        if method.allocation == "uniform":
            return uniform_masks(self.weights, sparsity)
        if method.allocation == "global":
            return global_masks(self.weights, sparsity)
        if method.allocation == RANDOM:
            return random_masks(self.weights, sparsity, self.seed)
        return sensitivity_masks(self.weights, self._curves(method.recalibrated), sparsity)

    def prune(self, method: Method, sparsity: float) -> ResNet18:
        """Return a pruned copy, its batch norms re-estimated where the method says so."""
        pruned = copy.deepcopy(self.model)
        masks = self.masks(method, sparsity)
        device = self.chosen.images.images.device
        prune_model(pruned, {name: mask.to(device) for name, mask in masks.items()})
        if method.recalibrated:
            recalibrate_batch_norm(pruned, self.training)
        return pruned

    def find_largest(self, method: Method) -> tuple[float, list[Step]]:
        """Return the largest sparsity within the tolerance, and the steps that led to it."""
        if method not in self._found:
            steps: list[Step] = []

            def is_kept(level: int) -> bool:
                sparsity = level / LEVELS
                steps.append(self.judge(self.prune(method, sparsity), sparsity))
                return steps[-1].kept

            self._found[method] = (largest_level(is_kept) / LEVELS, steps)
        return self._found[method]

    def find_correct(self, half: Half, model: ResNet18) -> torch.Tensor:
        """Return which images of ``half`` a pruned model gets right (bool, on the CPU)."""
        return Classifier(model, self.chosen.images.images, self.fast).find_correct(half.images)

    def judge(self, model: ResNet18, sparsity: float) -> Step:
        """Decide on the half to choose on whether a model, pruned by ``sparsity``, is kept."""
        images, dense_correct = self.chosen.images, self.chosen.dense_correct
        classifier = Classifier(model, images.images, self.fast)
        correct = torch.empty(0, dtype=torch.bool)
        for start in range(0, len(images), CHUNK_IMAGES):
            chunk = images.rows(slice(start, start + CHUNK_IMAGES))
            correct = torch.cat([correct, classifier.find_correct(chunk)])
            spare = clearance(dense_correct[: len(correct)], correct, self.tolerance)
            if abs(spare) > CLEAR_ERRORS:
                break
        return Step(sparsity, len(correct), int(correct.sum()), spare >= SPARE_ERRORS)

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
