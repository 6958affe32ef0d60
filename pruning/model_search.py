"""How far the whole network can be pruned: the largest sparsity within the tolerance, and a curve.

One half of the test images chooses, the other confirms; the two have no image in common. Where an
amount is chosen because its loss is just within the tolerance, new images find it outside as often
as not, so a choice must leave one standard error to spare.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from common import checkpoint, cli
from common.data import Cifar10, load_images
from common.evaluate import compare, measure_accuracy, predict
from common.model import ResNet18, prunable_layers
from common.size import Layer
from common.sources import Source
from pruning import savings
from pruning.allocation import (
    RANDOM,
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
from pruning.recalibration import RECALIBRATION_IMAGES, recalibrate_batch_norm

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
    """Return the half to choose on, in random order, and the half to confirm on."""
    positions = Cifar10(torch.arange(len(test)), test.labels.cpu()).split_halves(seed)
    chosen, held_out = (half.images for half in positions)
    # Sorted by class as they are, the first images would not speak for the rest.
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    return tuple(
        Half(Cifar10(test.images[rows], test.labels[rows]), dense_correct[rows])
        for rows in (chosen, held_out)
    )


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
    _damage: dict[bool, dict] = field(default_factory=dict)

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
                steps.append(self._try(method, level / LEVELS))
                return steps[-1].kept

            self._found[method] = (largest_level(is_kept) / LEVELS, steps)
        return self._found[method]

    def run(self, allocations: Sequence[str], layers: Sequence[Layer]) -> list[dict]:
        """Run every method, random pruning last: results.json's ``model_search``."""
        methods = [
            Method(allocation, recalibrated)
            for recalibrated in ((False,) if self.training is None else (False, True))
            for allocation in (*allocations, RANDOM)
        ]
        entries = []
        for method in methods:
            entries.append(describe_method(self, method, layers))
            cli.log.info(
                "%s%s: %.1f %% of the weights can go (%.0f s)",
                method.allocation,
                ", batch norms recalibrated" if method.recalibrated else "",
                100 * entries[-1]["max_sparsity"],
                entries[-1]["search_seconds"],
            )
        return entries

    def save_best(self, entries: Sequence[dict], plain: Path, packed: Path) -> dict:
        """Write the sparsest model found, reload it and measure it again.

        Returns:
            results.json's ``model_saved``.

        Raises:
            UserError: More than 1 prediction in 1,000 differs from the search's.
        """
        entry = best_entry(entries)
        method = Method(entry["allocation"], entry["recalibrated"])
        pruned = self.prune(method, entry["max_sparsity"])
        sizes = savings.save_artifacts(self.model, pruned, plain, packed)
        images = self.held_out.images
        reloaded = checkpoint.load_model(plain).to(images.images.device)
        correct = predict(reloaded, images, description="confirm") == images.labels.cpu()
        unlike = int((correct != self.correct_on(self.held_out, pruned)).sum())
        savings.check_flips(unlike, len(correct))
        return {
            "allocation": method.allocation,
            "recalibrated": method.recalibrated,
            "finetune_epochs": entry["finetune_epochs"],
            "sparsity": entry["max_sparsity"],
            "macs_kept": entry["macs_kept"],
            "accuracy": measure_accuracy(correct).as_dict(),
            "comparison": compare(self.held_out.dense_correct, correct).as_dict(),
            "images_unlike_search": unlike,
            **sizes,
            "latency": savings.time_zeros(self.model, reloaded, "pruned", images),
        }

    def correct_on(self, half: Half, model: ResNet18) -> torch.Tensor:
        """Return which images of ``half`` a pruned model gets right."""
        return Classifier(model, self.chosen.images.images, self.fast).find_correct(half.images)

    def _try(self, method: Method, sparsity: float) -> Step:
        chosen = self.chosen
        model = self.prune(method, sparsity)
        classifier = Classifier(model, chosen.images.images, self.fast)
        correct = torch.empty(0, dtype=torch.bool)
        for images, labels in zip(
            chosen.images.images.split(CHUNK_IMAGES),
            chosen.images.labels.split(CHUNK_IMAGES),
            strict=True,
        ):
            correct = torch.cat([correct, classifier.find_correct(Cifar10(images, labels))])
            spare = clearance(chosen.dense_correct[: len(correct)], correct, self.tolerance)
            if abs(spare) > CLEAR_ERRORS:
                break
        return Step(sparsity, len(correct), int(correct.sum()), spare >= SPARE_ERRORS)

    def _curves(self, recalibrated: bool) -> dict:
        """Measure the layers' damage around what global pruning leaves at its own limit."""
        if recalibrated not in self._damage:
            around = Method("global", recalibrated)
            context = self.prune(around, self.find_largest(around)[0])
            images = self.chosen.images.images[:DAMAGE_IMAGES]
            self._damage[recalibrated] = measure_damage(
                self.model, context, list(self.weights), images, self.fast
            )
        return self._damage[recalibrated]


def describe_method(search: ModelSearch, method: Method, layers: Sequence[Layer]) -> dict:
    """Search with one method and measure it on the held-out half: an entry of ``model_search``."""
    started = time.perf_counter()
    sparsity, steps = search.find_largest(method)
    search_seconds = time.perf_counter() - started
    points = [measure_point(search, method, 1 - 1 / times) for times in COMPRESSIONS]
    pruned = search.prune(method, sparsity)
    found = measure_model(search, pruned)
    curve = [(0.0, float(search.held_out.dense_correct.float().mean()))]
    curve += [(p["sparsity"], p["accuracy"]["value"]) for p in points]
    curve.append((sparsity, found["accuracy"]["value"]))
    return {
        "scope": search.scope,
        "allocation": method.allocation,
        "recalibrated": method.recalibrated,
        "finetune_epochs": 0,
        "max_sparsity": sparsity,
        "chosen_on_images": len(search.chosen.dense_correct),
        **found,
        "within_tolerance": found["comparison"]["drop"] <= search.tolerance + 1e-12,
        "curve": [list(point) for point in sorted(set(curve))],
        "points": points,
        "steps": [asdict(step) for step in steps],
        "search_seconds": search_seconds,
        **describe_density(pruned, layers),
    }


def measure_point(search: ModelSearch, method: Method, sparsity: float) -> dict:
    """Measure one sparsity on the held-out half."""
    return {"sparsity": sparsity, **measure_model(search, search.prune(method, sparsity))}


def measure_model(search: ModelSearch, model: ResNet18) -> dict:
    """Return a model's accuracy on the held-out half, and its comparison with dense."""
    correct = search.correct_on(search.held_out, model)
    return {
        "accuracy": measure_accuracy(correct).as_dict(),
        "comparison": compare(search.held_out.dense_correct, correct).as_dict(),
    }


def describe_density(model: ResNet18, layers: Sequence[Layer]) -> dict:
    """Return a pruned model's zeros by layer, and the multiply-adds that are not with a zero."""
    kept = {
        name: int(module.weight.count_nonzero()) / module.weight.numel()
        for name, module in prunable_layers(model).items()
    }
    macs = sum(layer.macs for layer in layers)
    return {
        "layers": [{"layer": name, "sparsity": 1 - density} for name, density in kept.items()],
        "macs_kept": sum(layer.macs * kept[layer.name] for layer in layers) / macs,
    }


def best_entry(entries: Sequence[dict]) -> dict:
    """Return the entry with the most weights pruned; random pruning is no candidate."""
    return max(
        (entry for entry in entries if entry["allocation"] != RANDOM),
        key=lambda entry: (entry["max_sparsity"], entry["accuracy"]["value"]),
    )


def load_training(source: Source, seed: int) -> torch.Tensor:
    """Return the training images that batch norms are re-estimated on: uint8, (N, 3, 32, 32)."""
    return load_images(source, "train", RECALIBRATION_IMAGES, seed).images
