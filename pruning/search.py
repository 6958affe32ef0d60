"""How far the linear layer can be pruned: binary search, and the sweep that checks its answer.

The linear layer is the last one, so its input is the same however much of it is pruned. With that
input kept for every image, an amount costs one small matrix product, and going from one pruned
weight to the next changes one logit an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.data import Cifar10
from common.evaluate import Accuracy
from common.model import ResNet18
from pruning.masks import l1_mask


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
    one may exist: :func:`largest_within` finds it.

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


def count_correct(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> int:
    """Count the images that a linear layer classifies correctly, in FP64."""
    logits = features.double() @ weight.double().T + bias.double()
    return int((logits.argmax(dim=1) == labels).sum())


def sweep(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> np.ndarray:
    """Count the correct images for every number of pruned weights of the linear layer.

    Each step takes one weight's share out of one class's logits, in FP64 so that 5,120 steps add
    up to less than the rounding of one FP32 product.

    Args:
        features: The layer's input, shape (N, features).
        labels: int64, shape (N,).
        weight: Shape (classes, features).
        bias: Shape (classes,).

    Returns:
        int64, shape (number of weights + 1,): entry k for the k smallest weights pruned.
    """
    values = weight.double().numpy()
    columns = np.ascontiguousarray(features.double().numpy().T)
    logits = values @ columns + bias.double().numpy()[:, None]
    label = labels.numpy()
    counts = np.empty(weight.numel() + 1, dtype=np.int64)
    kept = np.ones(values.shape, dtype=bool)
    for count in range(weight.numel() + 1):
        mask = l1_mask(weight, count).numpy()
        # One weight, except among equal magnitudes, where torch may exchange some.
        for row, column in np.argwhere(mask != kept):
            sign = 1.0 if mask[row, column] else -1.0
            logits[row] += sign * values[row, column] * columns[column]
        kept = mask
        counts[count] = np.count_nonzero(logits.argmax(axis=0) == label)
    return counts


def largest_within(correct: np.ndarray, required: int) -> int:
    """Return the largest count whose entry of ``correct`` is at least ``required``."""
    return int(np.flatnonzero(correct >= required)[-1])


def is_monotone(correct: np.ndarray) -> bool:
    """Return whether correctness never rises as more weights are pruned."""
    return bool((np.diff(correct) <= 0).all())


def explain(correct: np.ndarray, required: int, found: int) -> str:
    """Say in one sentence how the binary search's answer and the true maximum relate."""
    largest = largest_within(correct, required)
    if found == largest:
        return "the sweep over every possible amount confirms the binary search"
    first_failure = int(np.flatnonzero(correct < required)[0])
    return (
        f"accuracy is not monotone: it leaves the tolerance at {first_failure:,} pruned weights "
        f"and is within it again up to {largest:,}; a step of the binary search fell into the gap"
    )


def search_linear(
    model: ResNet18,
    features: torch.Tensor,
    labels: torch.Tensor,
    tolerance: float,
    holdout_seed: int | None,
) -> tuple[dict, int]:
    """Find how many of the linear layer's weights can go, and check that against every count.

    Args:
        model: The dense model.
        features: The linear layer's input for every image, FP32, shape (N, features), on the CPU.
        labels: int64, shape (N,), on the CPU.
        tolerance: Accuracy that may be lost, as a fraction.
        holdout_seed: Choose on one half of the images, confirm on the other; None for all.

    Returns:
        results.json's ``linear_search``, and the number of weights that can go.
    """
    weight, bias = model.linear.weight.detach().cpu(), model.linear.bias.detach().cpu()
    total = weight.numel()
    chosen, held_out = torch.arange(len(labels)), None
    if holdout_seed is not None:
        indices = Cifar10(chosen, labels).split_halves(holdout_seed)
        chosen, held_out = (half.images for half in indices)

    def correct_at(count: int, rows: torch.Tensor) -> int:
        pruned = weight * l1_mask(weight, count)
        return count_correct(features[rows], labels[rows], pruned, bias)

    dense = correct_at(0, chosen)
    required = required_correct(dense, len(chosen), tolerance)
    found, steps = binary_search(lambda n: correct_at(n, chosen), total, required)
    correct = sweep(features[chosen], labels[chosen], weight, bias)
    largest = largest_within(correct, required)
    result = {
        "tolerance": tolerance,
        "images": len(chosen),
        "dense": Accuracy(dense, len(chosen)).as_dict(),
        "max_amount": found / total,
        "kept_weights": total - found,
        "steps": [
            {
                "amount": step.count / total,
                "pruned_weights": step.count,
                "accuracy": Accuracy(step.correct, len(chosen)).as_dict(),
                "kept": step.kept,
            }
            for step in steps
        ],
        "curve": [[count / total, int(n) / len(chosen)] for count, n in enumerate(correct)],
        "exhaustive_max_amount": largest / total,
        "monotone": is_monotone(correct),
        "explanation": explain(correct, required, found),
    }
    if held_out is not None:
        accuracies = [Accuracy(correct_at(n, held_out), len(held_out)) for n in (0, found)]
        drop = accuracies[0].value - accuracies[1].value
        result["holdout"] = {
            "dense": accuracies[0].as_dict(),
            "accuracy": accuracies[1].as_dict(),
            "drop": drop,
            "within_tolerance": drop <= tolerance + 1e-12,
        }
    return result, found
