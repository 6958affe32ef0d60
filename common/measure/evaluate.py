"""Accuracy and comparison, all of it on per-image correctness.

Two models are compared on the same images, so their errors are paired: the test uses only the
images on which the two disagree, the interval their number among all.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from common.command import cli
from common.images.data import ImageSet

CONFIDENCE = 0.95
# Quantile of the standard normal distribution. Importing SciPy's statistics would take longer than
# evaluating 50 images.
Z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy: ``correct`` of ``total`` images."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The accuracy as a fraction."""
        return self.correct / self.total

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson, 1927, doi:10.2307/2276774)."""
        share = Z * Z / self.total
        middle = (self.value + share / 2) / (1 + share)
        spread = (share * (self.value * (1 - self.value) + share / 4)) ** 0.5 / (1 + share)
        low = 0.0 if self.correct == 0 else middle - spread  # exactly, where rounding would not be
        high = 1.0 if self.correct == self.total else middle + spread
        return low, high

    def as_dict(self) -> dict:
        """Return the ``accuracy`` object of results.json."""
        return {**asdict(self), "value": self.value, "ci95": list(self.ci95)}


@dataclass(frozen=True)
class Comparison:
    """Model a against model b on the same images; a positive ``drop`` means that b is worse."""

    drop: float
    ci95: tuple[float, float]
    mcnemar_p: float
    only_a_correct: int
    only_b_correct: int

    def as_dict(self) -> dict:
        """Return the ``comparison`` object of results.json."""
        return asdict(self) | {"ci95": list(self.ci95)}


@dataclass(frozen=True)
class Paired:
    """A model's accuracy, and the dense model (a) against it (b) on the same images."""

    accuracy: Accuracy
    comparison: Comparison

    @classmethod
    def of(cls, dense_correct: torch.Tensor, correct: torch.Tensor) -> "Paired":
        """Compute both from per-image correctness (bool, shape (N,))."""
        return cls(measure_accuracy(correct), compare(dense_correct, correct))

    def as_dict(self) -> dict:
        """Return the ``accuracy`` and ``comparison`` of results.json."""
        return {"accuracy": self.accuracy.as_dict(), "comparison": self.comparison.as_dict()}


@torch.inference_mode()
def predict(
    model: nn.Module, dataset: ImageSet, batch_size: int = 128, description: str = "evaluate"
) -> torch.Tensor:
    """Return the predicted class of every image: int64, shape (N,), on the CPU.

    The model runs as it is, in its own train/eval mode, on the device where ``dataset`` lies.
    """
    count = math.ceil(len(dataset) / batch_size)
    loader = cli.progress(dataset.batches(batch_size), description, count)
    return torch.cat([model(images).argmax(dim=1) for images, _ in loader]).cpu()


def measure_accuracy(correct: torch.Tensor) -> Accuracy:
    """Count per-image correctness (bool, shape (N,)) into an accuracy."""
    return Accuracy(int(correct.sum()), correct.numel())


def compare(correct_a: torch.Tensor, correct_b: torch.Tensor) -> Comparison:
    """Compare two models by their per-image correctness (bool, shape (N,)) on the same images."""
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"not the same images: {correct_a.shape} and {correct_b.shape}")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    total = correct_a.numel()
    interval = paired_difference_interval(only_a, only_b, total)
    p_value = mcnemar_exact(only_a, only_b)
    return Comparison((only_a - only_b) / total, interval, p_value, only_a, only_b)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p-value from the two counts of discordant images."""
    discordant = only_a + only_b
    ways = tail = 1  # ways to place k discordant images on the rarer side; their sum up to k
    for k in range(min(only_a, only_b)):
        ways = ways * (discordant - k) // (k + 1)
        tail += ways
    return min(2 * tail / 2**discordant, 1.0)


def paired_difference_interval(only_a: int, only_b: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a difference of paired proportions.

    Inverts the score test with the constrained maximum-likelihood estimate (Tango, 1998,
    doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B). Unlike Wald's it does not
    collapse to a point when two models agree on every image.
    """
    estimate = (only_a - only_b) / total

    def score(difference: float) -> float:
        # The roots of score ± z are the limits. q: the constrained estimate of P(only b).
        a = 2 * total
        b = -only_a - only_b + (2 * total - only_a + only_b) * difference
        c = -only_b * difference * (1 - difference)
        q = (max(b * b - 4 * a * c, 0.0) ** 0.5 - b) / (2 * a)
        variance = total * (2 * q + difference * (1 - difference))
        return (only_a - only_b - total * difference) / max(variance, 1e-300) ** 0.5

    edge = 1 - 1e-12
    low = -1.0 if score(-edge) < Z else _crossing(score, Z, -edge, estimate)
    high = 1.0 if score(edge) > -Z else _crossing(score, -Z, estimate, edge)
    return low, high


def _crossing(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Return where between ``low`` and ``high`` a falling function passes ``level``."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return middle
