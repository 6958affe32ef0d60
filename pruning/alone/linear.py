"""How far the linear layers can be pruned: a binary search, and the sweep that checks its answer.

An answer is chosen because it is just within the tolerance on some images; on others it may not be.
So the choice is repeated on random halves of the images, each judged on the other half.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from common.measure.evaluate import Accuracy
from pruning.alone.head import Head

SPLITS = 200


def required_correct(dense_correct: int, total: int, tolerance: float) -> int:
    """Return how many images must stay correct for accuracy to be within ``tolerance`` of dense."""
    return max(0, math.ceil(dense_correct - tolerance * total - 1e-9))


def binary_search(
    correct_at: Callable[[int], int], largest: int, required: int
) -> tuple[int, list[int]]:
    """Return the largest level that keeps ``required`` images correct, and the levels tried.

    Where correctness does not fall steadily, the answer still holds, but a larger one may exist:
    the sweep finds it. Level 0, nothing pruned, is not tried.
    """
    low, high, tried = 0, largest, []
    while low < high:
        tried.append(level := (low + high + 1) // 2)
        low, high = (level, high) if correct_at(level) >= required else (low, level - 1)
    return low, tried


def repeat_on_halves(
    correct: np.ndarray, amounts: np.ndarray, tolerance: float, seed: int
) -> dict | None:
    """Repeat the binary search on a sweep's images, in ``SPLITS`` random halves.

    One half chooses a level, the other half judges it. ``correct`` is a sweep, bool, (levels, N);
    ``amounts`` are the levels as fractions. Return results.json's ``splits``: the chosen amounts,
    and the accuracy that each lost on its other half; None for fewer than two images.
    """
    largest, total = correct.shape[0] - 1, correct.shape[1]
    half = total // 2
    if not half:
        return None
    rng = np.random.default_rng(seed)
    levels, drops = np.empty(SPLITS, np.int64), np.empty(SPLITS)
    for split in range(SPLITS):
        chooses, judges = np.split(rng.permutation(total), [half])

        def correct_at(level: int, images: np.ndarray = chooses) -> int:
            return int(correct[level, images].sum())

        required = required_correct(correct_at(0), half, tolerance)
        levels[split], _ = binary_search(correct_at, largest, required)
        lost = correct_at(0, judges) - correct_at(levels[split], judges)
        drops[split] = lost / len(judges)
    return {
        "splits": SPLITS,
        "within_tolerance": int((drops <= tolerance + 1e-9).sum()),
        "amount": _spread(amounts[levels]),
        "drop": {**_spread(drops), "mean": float(drops.mean())},
    }


def _spread(values: np.ndarray) -> dict:
    """Return the median and the range of the middle 90 %."""
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
    return {"median": median, "middle90": [low, high]}


def compare_with_sweep(
    found: int, correct: np.ndarray, required: int, counts: np.ndarray
) -> dict[str, object]:
    """Return how the binary search's answer and the true maximum relate, for results.json.

    ``correct`` and ``counts`` hold for each level the number of correct images and of pruned
    weights, int64; ``found`` is the level of the answer, ``required`` what it keeps correct.
    """
    largest = int(np.flatnonzero(correct >= required)[-1])
    explanation = "the sweep over every possible amount confirms the binary search"
    if found != largest:
        first_failure = int(np.flatnonzero(correct < required)[0])
        explanation = (
            f"accuracy is not monotone: it leaves the tolerance at {counts[first_failure]:,} "
            f"pruned weights and is within it again up to {counts[largest]:,}; a step of the "
            "binary search fell into the gap"
        )
    return {
        "exhaustive_max_amount": float(counts[largest] / counts[-1]),
        "monotone": bool((np.diff(correct) <= 0).all()),
        "explanation": explanation,
    }


def search_linear(
    head: Head, features: torch.Tensor, labels: torch.Tensor, tolerance: float, seed: int
) -> tuple[int, dict]:
    """Find how far the linear layers can be pruned together, and check that at every level.

    ``features`` are the layers' input for every image, FP32, (N, features), on the CPU. Return the
    level that the binary search found, and the ``linear_search`` object of results.json.
    """
    sweep, images = head.sweep(features, labels), len(labels)
    correct = sweep.sum(axis=1)
    required = required_correct(int(correct[0]), images, tolerance)
    found, tried = binary_search(lambda level: int(correct[level]), head.levels, required)
    counts = np.array([sum(head.counts_at(level).values()) for level in range(head.levels + 1)])
    amounts = counts / counts[-1]
    described = {
        "layers": list(head.weights),
        "tolerance": tolerance,
        "images": images,
        "dense": Accuracy(int(correct[0]), images).as_dict(),
        "max_amount": float(amounts[found]),
        "pruned_weights": int(counts[found]),
        "kept_weights": int(counts[-1] - counts[found]),
        "steps": [
            {
                "amount": float(amounts[level]),
                "pruned_weights": int(counts[level]),
                "accuracy": Accuracy(int(correct[level]), images).as_dict(),
                "kept": bool(correct[level] >= required),
            }
            for level in tried
        ],
        "curve": np.stack([amounts, correct / images], axis=1).tolist(),
        **compare_with_sweep(found, correct, required, counts),
    }
    if splits := repeat_on_halves(sweep, amounts, tolerance, seed):
        described["splits"] = splits
    return found, described
