"""How far the linear layers can be pruned: binary search, and the sweep that checks its answer.

The linear layers are the last ones, so their input is the same however much of them is pruned. With
that input kept for every image, an amount costs a few small matrix products. For a single layer,
going from one pruned weight to the next changes one logit an image.

An answer is chosen because it is just within the tolerance on some images; on others it may not be.
So the choice is repeated on random halves, each judged by the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.command import cli
from common.network.execution import Network
from common.network.graph import LINEAR
from pruning.masks import l1_mask, pruned_count

# Amounts to sweep: every number of weights, where a single layer has at most this many; else a
# thousand of a single layer, and whole percents of several.
MOST_WEIGHTS = 65_536
AMOUNTS_OF_ONE, AMOUNTS_OF_SEVERAL = 1000, 100
SPLITS = 200


@dataclass(frozen=True)
class Head:
    """The linear layers at the end of a network, which are pruned together.

    Attributes:
        network: The dense network, on the CPU.
        features: Name of the operation whose value, one vector an image, is all that they need.
        layers: Their names, in execution order.
        weights: Their weights without batch norms, by whose magnitudes weights are chosen.
    """

    network: Network
    features: str
    layers: tuple[str, ...]
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, network: Network, weights: Mapping[str, torch.Tensor]) -> Head | None:
        """Find the linear layers that the logits depend on through one vector an image.

        Args:
            network: On any device.
            weights: Weight of every layer without the batch norm.

        Returns:
            None where there are none: the network's last layer is a convolution.
        """
        graph, found = network.graph, None
        linear = [name for name in graph.layers if graph[name].kind == LINEAR]
        for first in reversed(range(len(linear))):
            layers = tuple(linear[first:])
            inside = graph.affected_by(layers)
            read = {name for inner in inside for name in graph[inner].inputs} - inside
            if len(read) != 1 or len(network.shapes[features := read.pop()]) != 1:
                break
            own = {name: weights[name].cpu() for name in layers}
            found = cls(network.to_device("cpu"), features, layers, own)
        return found

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def is_single(self) -> bool:
        """Whether the head is one layer that gives the logits, without a batch norm."""
        name = self.network.graph.output
        return self.layers == (name,) and torch.equal(
            self.weights[name], self.network.layers[name].weight
        )

    @property
    def levels(self) -> int:
        """The number of amounts to try: level k prunes k of ``levels`` parts of every layer."""
        if not self.is_single:
            return AMOUNTS_OF_SEVERAL
        return self.total if self.total <= MOST_WEIGHTS else AMOUNTS_OF_ONE

    def counts_at(self, level: int) -> dict[str, int]:
        """Return how many weights of each layer go at a level."""
        amount = level / self.levels
        return {name: pruned_count(w.numel(), amount) for name, w in self.weights.items()}

    def masks_at(self, level: int) -> dict[str, torch.Tensor]:
        """Return the masks of the weights that are kept at a level."""
        return {n: l1_mask(self.weights[n], count) for n, count in self.counts_at(level).items()}

    def logits(
        self, features: torch.Tensor, masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Map features (N, features) to logits (N, classes), in the precision of the features."""
        layers = {}
        for name in self.layers:
            layer = self.network.layers[name]
            layers[name] = (layer.masked(masks[name]) if masks else layer).to(features.dtype)
        network, output = self.network.with_layers(layers), self.network.graph.output
        return network.run({self.features: features}, [output])[output]


@dataclass(frozen=True)
class SearchStep:
    """One step of the binary search.

    Attributes:
        level: Level that was tried.
        correct: Number of correct images.
        kept: Whether that is within the tolerance.
    """

    level: int
    correct: int
    kept: bool


def required_correct(dense_correct: int, total: int, tolerance: float) -> int:
    """Return how many images must stay correct for accuracy to be within ``tolerance`` of dense."""
    return max(0, math.ceil(dense_correct - tolerance * total - 1e-9))


def binary_search(
    correct_at: Callable[[int], int], largest: int, required: int
) -> tuple[int, list[SearchStep]]:
    """Search the largest level that keeps ``required`` images correct.

    The answer is right where correctness falls steadily. Where it does not, the answer still holds,
    but a larger one may exist: the sweep finds it.

    Args:
        correct_at: Returns the number of correct images at a level. Level 0, nothing pruned, is
            taken to be within the tolerance.
        largest: Largest level.
        required: Images that must stay correct.

    Returns:
        The level, and the steps that led to it.
    """
    low, high, steps = 0, largest, []
    while low < high:
        level = (low + high + 1) // 2
        correct = correct_at(level)
        kept = correct >= required
        steps.append(SearchStep(level, correct, kept))
        low, high = (level, high) if kept else (low, level - 1)
    return low, steps


def sweep(head: Head, features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Find the correct images at every level.

    Args:
        head: What to prune.
        features: Its input, FP32, shape (N, features).
        labels: int64, shape (N,).

    Returns:
        bool, shape (levels + 1, N).
    """
    if head.levels == head.total:
        layer = head.network.layers[head.layers[0]]
        return sweep_single(features, labels, layer.weight, layer.bias)
    correct = np.empty((head.levels + 1, len(labels)), dtype=bool)
    for level in cli.progress(range(head.levels + 1), "linear layers", unit="amount"):
        logits = head.logits(features, head.masks_at(level))
        correct[level] = (logits.argmax(dim=1) == labels).numpy()
    return correct


def sweep_single(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> np.ndarray:
    """Find the correct images for every number of pruned weights of one linear layer.

    Each step takes one weight's share out of one class's logits, in FP64, so that thousands of
    steps add up to less than the rounding of one FP32 product.

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
        levels: Level that each split chose; int64, shape (SPLITS,).
        drops: Accuracy that each split lost on its other half; shape (SPLITS,).
        within: Number of splits in which that loss is within the tolerance.
    """

    levels: np.ndarray
    drops: np.ndarray
    within: int


def repeat_on_halves(correct: np.ndarray, tolerance: float, seed: int) -> Splits | None:
    """Repeat the binary search on random halves; None where there is no image to judge by.

    Args:
        correct: Result of :func:`sweep`.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Seed of the halves.
    """
    largest, total = correct.shape[0] - 1, correct.shape[1]
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
    levels = [
        binary_search(
            lambda level, of=chosen[:, split]: int(of[level]),
            largest,
            required_correct(int(chosen[0, split]), half, tolerance),
        )[0]
        for split in range(SPLITS)
    ]
    others = total - half
    lost = judged[0] - judged[levels, range(SPLITS)]
    return Splits(np.array(levels), lost / others, int((lost <= tolerance * others + 1e-9).sum()))


@dataclass(frozen=True)
class LinearSearch:
    """Result of the search.

    Attributes:
        layers: Names of the layers that were pruned together, by the same amount.
        counts: Number of pruned weights at each level; int64, shape (levels + 1,).
        tolerance: Accuracy that may be lost, as a fraction.
        found: Level that the binary search found.
        steps: Steps of the binary search.
        required: Number of images that must stay correct.
        images: Number of images.
        correct: Number of correct images at each level; int64, shape (levels + 1,).
        splits: The choice repeated on halves; None where there is only one image.
    """

    layers: tuple[str, ...]
    counts: np.ndarray
    tolerance: float
    found: int
    steps: list[SearchStep]
    required: int
    images: int
    correct: np.ndarray
    splits: Splits | None

    @property
    def weights(self) -> int:
        """The number of weights of the layers."""
        return int(self.counts[-1])

    @property
    def largest(self) -> int:
        """The largest level within the tolerance, of all levels."""
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
            f"accuracy is not monotone: it leaves the tolerance at {self.counts[first_failure]:,} "
            f"pruned weights and is within it again up to {self.counts[self.largest]:,}; a step of "
            "the binary search fell into the gap"
        )


def search_linear(
    head: Head, features: torch.Tensor, labels: torch.Tensor, tolerance: float, seed: int
) -> LinearSearch:
    """Find how far the linear layers can be pruned together, and check that at every level.

    Args:
        head: The layers.
        features: Their input for every image, FP32, shape (N, features), on the CPU.
        labels: int64, shape (N,), on the CPU.
        tolerance: Accuracy that may be lost, as a fraction.
        seed: Seed of the halves.
    """
    inputs = features.double() if head.is_single else features

    def correct_at(level: int) -> int:
        logits = head.logits(inputs, head.masks_at(level))
        return int((logits.argmax(dim=1) == labels).sum())

    required = required_correct(correct_at(0), len(labels), tolerance)
    found, steps = binary_search(correct_at, head.levels, required)
    correct = sweep(head, features, labels)
    counts = np.array([sum(head.counts_at(level).values()) for level in range(head.levels + 1)])
    return LinearSearch(
        head.layers, counts, tolerance, found, steps, required, len(labels), correct.sum(axis=1),
        repeat_on_halves(correct, tolerance, seed),
    )  # fmt: skip
