"""FP32's predictions at bf16's speed: FP32 decides the predictions of bf16 that are close.

Some CPUs run bf16 faster, AMD's Zen 4 and 5 more than twice as fast as FP32. A bf16 prediction can
differ from FP32's only where the two largest logits are close. So each image whose margin is below
a bound on the rounding error runs again in FP32. The bound is estimated on a sample of the same
images. This is a heuristic, so every run records how near the bound a prediction changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from common.command.cli import log
from common.images.data import ImageSet
from common.network.branching import Variant, branch_logits, start_values
from common.network.execution import Network

SAMPLE_IMAGES = 32
# The bound is the largest error on the sample times this factor: a heuristic, not a proof. With
# 1,500 images and all 21 layers of ResNet18 pruned by 90 %, bf16 alone changed 18 of 31,500
# predictions, none at a margin above 0.24 of the bound, and FP32 checked 1.2 % of the predictions.
SAFETY_FACTOR = 3.0
# Warn if FP32 changed a prediction whose margin exceeded two thirds of the bound.
NEAR_BOUND = 2 / 3


@dataclass
class Fp32Recheck:
    """Counts of the bf16 predictions that FP32 checked because they were close."""

    predictions: int = 0  # number of all predictions
    recomputed: int = 0  # predictions with a margin below the bound, which FP32 decided
    changed: int = 0  # recomputed predictions where FP32 gave another class
    largest_change: float = 0.0  # largest ratio of a changed one's margin to its bound, below 1

    def add(self, other: "Fp32Recheck") -> None:
        """Add the counts of another part of the predictions."""
        self.predictions += other.predictions
        self.recomputed += other.recomputed
        self.changed += other.changed
        self.largest_change = max(self.largest_change, other.largest_change)

    def warn_if_near(self, advice: str = "; --precision fp32 decides all of them") -> None:
        """Warn, with advice, if a change came so near the bound that others may lie beyond it."""
        if self.largest_change > NEAR_BOUND:
            log.warning(
                "bf16: FP32 changed a prediction at %.0f %% of the margin up to which it looks: "
                "some beyond may be wrong%s", 100 * self.largest_change, advice,
            )  # fmt: skip


def bounds_of(fast: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the margin (networks,) below which a bf16 prediction may be wrong.

    The logits, (networks, n, classes), are of the same sample. An error that all logits of an image
    share does not count, for a prediction depends on their differences.
    """
    errors = fast - exact
    largest = (errors.amax(dim=2) - errors.amin(dim=2)).amax(dim=1)
    return SAFETY_FACTOR * largest.clamp_min(torch.finfo(torch.float32).tiny)


def decide(
    fast: torch.Tensor, bounds: torch.Tensor, look_again: Callable[[torch.Tensor], torch.Tensor],
    record: Fp32Recheck,
) -> torch.Tensor:  # fmt: skip
    """Return the classes (networks, n) that FP32 predicts, from bf16 logits (networks, n, classes).

    ``look_again`` returns FP32's classes where a mask (bool, (networks, n)) is true, in order.
    """
    best, classes = fast.topk(2, dim=2)
    predictions = classes[..., 0]
    margin_to_bound = (best[..., 0] - best[..., 1]) / bounds[:, None]
    close = margin_to_bound < 1
    record.predictions += close.numel()
    if close.any():
        decided = look_again(close)
        changed = margin_to_bound[close][decided != predictions[close]]
        predictions[close] = decided
        largest = float(changed.max()) if len(changed) else 0.0
        record.add(Fp32Recheck(0, len(decided), len(changed), largest))
    return predictions


@dataclass(frozen=True)
class Variants:
    """Variants of a network: for each layer, what replaces it alone."""

    exact: Mapping[str, Variant]  # in FP32
    fast: Mapping[str, Variant] | None  # in bf16; None where only FP32 runs
    bounds: torch.Tensor | None = None  # margins of bf16 below which FP32 decides


@dataclass(frozen=True)
class Cascade:
    """A network in FP32, and in bf16 unless everything runs in FP32."""

    network: Network
    fast_network: Network | None

    @classmethod
    def of(cls, network: Network, fast: bool) -> "Cascade":
        """Prepare a network, to run in bf16 first if ``fast``."""
        return cls(network, network.to(torch.bfloat16) if fast else None)

    def predict(
        self, dense: Mapping[str, torch.Tensor], variants: Variants, record: Fp32Recheck
    ) -> torch.Tensor:
        """Return the classes (variants, n) that FP32 predicts, without waiting for a GPU in FP32.

        ``dense`` holds FP32 values that :func:`common.network.branching.start_values` names.
        """
        if self.fast_network is None:
            return _all_logits(self.network, dense, variants.exact).argmax(dim=2)

        def look_again(close: torch.Tensor) -> torch.Tensor:
            masks = zip(variants.exact, close, strict=True)
            rows = {layer: mask.nonzero().flatten() for layer, mask in masks if mask.any()}
            exact = {layer: variants.exact[layer] for layer in rows}
            return branch_logits(self.network, dense, exact, rows).argmax(dim=1)

        fast = _all_logits(self.fast_network, dense, variants.fast)
        return decide(fast, variants.bounds, look_again, record)

    def walk(
        self, features: str | None, variants: Sequence[Variants], images: ImageSet,
        batch_size: int, record: Fp32Recheck,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
        """Run the network and variants of the same layers; in FP32 this never waits for a GPU.

        Yield for each batch of n images the correctness of the network, bool, (n,); the value of
        the operation ``features``, FP32, (n, width), or no columns; the correctness of each layer's
        variants.
        """
        network, graph = self.network, self.network.graph
        wanted = [graph.output, *([features] if features else [])]
        wanted += start_values(graph, variants[0].exact) if variants else []
        for pixels, labels in images.batches(batch_size):
            dense = network.run({graph.input: pixels}, wanted)
            found = [self.predict(dense, variant, record) for variant in variants]
            none = pixels.new_empty(len(pixels), 0)
            yield (
                dense[graph.output].argmax(dim=1) == labels,
                dense[features] if features else none,
                torch.cat(found) == labels if found else none.T,
            )

    def measure_bounds(self, images: ImageSet, variants: Variants, batch_size: int) -> torch.Tensor:
        """Return each variant's margin (variants,) below which a bf16 prediction may be wrong."""
        # Evenly spaced, since a whole split is sorted by class.
        count = min(SAMPLE_IMAGES, len(images))
        sample = images.rows(torch.linspace(0, len(images) - 1, count).long())
        graph, found = self.network.graph, []
        wanted = start_values(graph, variants.exact)
        for batch, _ in sample.batches(batch_size):
            dense = self.network.run({graph.input: batch}, wanted)
            fast = _all_logits(self.fast_network, dense, variants.fast)
            found.append(bounds_of(fast, _all_logits(self.network, dense, variants.exact)))
        return torch.stack(found).amax(dim=0)


def _all_logits(
    network: Network, dense: Mapping[str, torch.Tensor], variants: Mapping[str, Variant]
) -> torch.Tensor:
    """Return the logits (variants, n, classes) of all variants on the whole batch."""
    logits = branch_logits(network, dense, variants)
    return logits.view(len(variants), -1, logits.shape[1])
