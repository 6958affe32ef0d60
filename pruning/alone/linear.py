"""How far the linear layer can be pruned: binary search, and the sweep that checks its answer.

The linear layer is the last one, so its input is the same however much of it is pruned. With that
input kept for every image, an amount costs one small matrix product, and going from one pruned
weight to the next changes one logit an image.

An answer is chosen because it is just within the tolerance on some images; on others it is not so
sure to be. So the choice is repeated on random halves, each judged by the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pruning.masks import l1_mask

SPLITS = 200


@dataclass(frozen=True)
class Step:
    """One step of the binary search: ``count`` weights pruned, ``correct`` images; kept or not."""

    count: int
    correct: int
    kept: bool


def required_correct(dense_correct: int, total: int, tolerance: float) -> int:
    """Return how many images must stay correct for accuracy to be within ``tolerance`` of dense."""
    return max(0, math.ceil(dense_correct - tolerance * total - 1e-9))


def binary_search(
    correct_at: Callable[[int], int], largest: int, required: int
) -> tuple[int, list[Step]]:
    """Search the largest pruned count that keeps ``required`` images correct.

    Right where correctness falls steadily. Where it does not, the answer still holds but a larger
    one may exist: the sweep finds it.

    Args:
        correct_at: Number of correct images for a number of pruned weights. Nothing pruned is
            taken to be within the tolerance.
        largest: The number of weights.
        required: Images that must stay correct.

    Returns:
        The count, and the steps that led to it.
    """
    low, high, steps = 0, largest, []
    while low < high:
        count = (low + high + 1) // 2
        correct = correct_at(count)
        kept = correct >= required
        steps.append(Step(count, correct, kept))
        low, high = (count, high) if kept else (low, count - 1)
    return low, steps


def sweep(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> np.ndarray:
    """Find the correct images for every number of pruned weights of the linear layer.

    Each step takes one weight's share out of one class's logits, in FP64 so that 5,120 steps add
    up to less than the rounding of one FP32 product.

    Args:
        features: The layer's input, shape (N, features).
        labels: int64, shape (N,).
        weight: Shape (classes, features).
        bias: Shape (classes,).

    Returns:
        bool, shape (number of weights + 1, N): row k with the k smallest weights pruned.
    """
    values = weight.double().numpy()
    columns = np.ascontiguousarray(features.double().numpy().T)
    logits = values @ columns + bias.double().numpy()[:, None]
    label = labels.numpy()
    correct = np.empty((weight.numel() + 1, len(label)), dtype=bool)
    kept = np.ones(values.shape, dtype=bool)
    for count in range(weight.numel() + 1):
        mask = l1_mask(weight, count).numpy()
        # One weight, except among equal magnitudes, where torch may exchange some.
        for row, column in np.argwhere(mask != kept):
            sign = 1.0 if mask[row, column] else -1.0
            logits[row] += sign * values[row, column] * columns[column]
        kept = mask
        np.equal(logits.argmax(axis=0), label, out=correct[count])
    return correct


@dataclass(frozen=True)
class Splits:
    """The choice repeated: in each of ``SPLITS``, one random half chooses and the other judges.

    Attributes:
        counts: Pruned weights that each split chose; int64, shape (SPLITS,).
        drops: Accuracy that each lost on its other half; shape (SPLITS,).
        within: Of how many splits that is within the tolerance.
    """

    counts: np.ndarray
    drops: np.ndarray
    within: int


def repeat_on_halves(correct: np.ndarray, tolerance: float, seed: int) -> Splits | None:
    """Repeat the binary search on random halves; None where there is no image to judge by.

    Args:
        correct: Of :func:`sweep`.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Of the halves.
    """
    weights, total = correct.shape[0] - 1, correct.shape[1]
    half = total // 2
    if not half:
        return None
    rng = np.random.default_rng(seed)
    chooses = np.zeros((total, SPLITS), dtype=np.float32)
    for split in range(SPLITS):
        chooses[rng.permutation(total)[:half], split] = 1
    # In parts, as FP32 takes four times the memory; whole numbers of images are exact in it.
    parts = np.array_split(correct, 32)
    chosen = np.concatenate([part.astype(np.float32) @ chooses for part in parts]).astype(np.int64)
    judged = correct.sum(axis=1)[:, None] - chosen
    counts = [
        binary_search(
            lambda n, of=chosen[:, split]: int(of[n]),
            weights,
            required_correct(int(chosen[0, split]), half, tolerance),
        )[0]
        for split in range(SPLITS)
    ]
    others = total - half
    lost = judged[0] - judged[counts, range(SPLITS)]
    return Splits(np.array(counts), lost / others, int((lost <= tolerance * others + 1e-9).sum()))


@dataclass(frozen=True)
class LinearSearch:
    """How many of the linear layer's weights can go, and how that was found.

    Attributes:
        tolerance: Accuracy that may be lost, as a fraction.
        found: The binary search's answer, in weights.
        steps: That led to it.
        required: Images that had to stay correct.
        images: That it was chosen on.
        correct: Of these, those that each count leaves correct; int64, shape (weights + 1,).
        splits: The choice repeated on random halves; None where one image has none.
    """

    tolerance: float
    found: int
    steps: list[Step]
    required: int
    images: int
    correct: np.ndarray
    splits: Splits | None

    @property
    def weights(self) -> int:
        """All that the layer has."""
        return len(self.correct) - 1

    @property
    def largest(self) -> int:
        """The most weights that can go, of all counts."""
        return int(np.flatnonzero(self.correct >= self.required)[-1])

    @property
    def is_monotone(self) -> bool:
        """Whether correctness never rises as more weights are pruned."""
        return bool((np.diff(self.correct) <= 0).all())

    def explain(self) -> str:
        """Say in one sentence how the binary search's answer and the true maximum relate."""
        if self.found == self.largest:
            return "the sweep over every possible amount confirms the binary search"
        first_failure = int(np.flatnonzero(self.correct < self.required)[0])
        return (
            f"accuracy is not monotone: it leaves the tolerance at {first_failure:,} pruned "
            f"weights and is within it again up to {self.largest:,}; a step of the binary search "
            "fell into the gap"
        )


def search_linear(
    layer: nn.Linear, features: torch.Tensor, labels: torch.Tensor, tolerance: float, seed: int
) -> LinearSearch:
    """Find how many of the linear layer's weights can go, and check that against every count.

    Args:
        layer: Dense.
        features: Its input for every image, FP32, shape (N, features), on the CPU.
        labels: int64, shape (N,), on the CPU.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Of the halves.
    """
    weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()

    def count_correct(count: int) -> int:
        """Count the images that the pruned layer classifies correctly, in FP64."""
        pruned = (weight * l1_mask(weight, count)).double()
        logits = features.double() @ pruned.T + bias.double()
        return int((logits.argmax(dim=1) == labels).sum())

    required = required_correct(count_correct(0), len(labels), tolerance)
    found, steps = binary_search(count_correct, weight.numel(), required)
    correct = sweep(features, labels, weight, bias)
    splits = repeat_on_halves(correct, tolerance, seed)
    return LinearSearch(tolerance, found, steps, required, len(labels), correct.sum(axis=1), splits)
