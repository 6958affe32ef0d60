"""What the linear layer's answer is worth on images that did not choose it.

An answer is chosen because it is just within the tolerance on some images; on others it is not so
sure to be. So the choice is repeated on random halves, each judged by the other half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pruning.alone.bisection import binary_search, required_correct

SPLITS = 200


@dataclass(frozen=True)
class Splits:
    """The choice repeated: in each of many splits, one random half chooses and the other judges.

    Attributes:
        counts: Pruned weights that each split chose; int64, shape (splits,).
        drops: Accuracy that each lost on its other half; shape (splits,).
        within: Of how many splits that is within the tolerance.
    """

    counts: np.ndarray
    drops: np.ndarray
    within: int


def repeat_on_halves(
    correct: np.ndarray, tolerance: float, seed: int, splits: int = SPLITS
) -> Splits | None:
    """Repeat the binary search on random halves; None where there is no image to judge by.

    Args:
        correct: Of :func:`sweep`.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Of the halves.
        splits: How many.
    """
    weights, total = correct.shape[0] - 1, correct.shape[1]
    half = total // 2
    if not half:
        return None
    rng = np.random.default_rng(seed)
    chooses = np.zeros((total, splits), dtype=np.float32)
    for split in range(splits):
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
        for split in range(splits)
    ]
    others = total - half
    lost = judged[0] - judged[counts, range(splits)]
    return Splits(np.array(counts), lost / others, int((lost <= tolerance * others + 1e-9).sum()))
