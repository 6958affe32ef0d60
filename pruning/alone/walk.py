"""One walk over the images: the dense network and all pruned variants.

Each batch runs through the dense network once, and every pruned variant branches off it
(:mod:`common.network.branching`), in bf16 where that is fast, with FP32's predictions
(:mod:`common.network.cascade`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from common.images.data import ImageSet
from common.network.branching import start_values
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.execution import Network
from pruning.masks import l1_mask, pruned_count


@dataclass(frozen=True)
class PrunedVariants(Variants):
    """Variants of a network, each with one layer pruned by the same amount.

    Attributes:
        amount: Fraction to prune.
        achieved: For each layer, its fraction of zeros.
    """

    amount: float
    achieved: dict[str, float]

    @classmethod
    def of(
        cls, network: Network, weights: Mapping[str, torch.Tensor], amount: float, fast: bool
    ) -> PrunedVariants:
        """Prune each of some layers alone.

        Args:
            network: Dense network.
            weights: For each layer to prune, its weight without the batch norm, whose magnitudes
                decide; on any device.
            amount: Fraction to prune.
            fast: Whether to make variants in bf16 too.
        """
        exact, achieved = {}, {}
        for name, weight in weights.items():
            total = weight.numel()
            kept = l1_mask(weight.cpu(), pruned_count(total, amount)).to(weight.device)
            achieved[name] = (total - int(weight.masked_fill(~kept, 0).count_nonzero())) / total
            # Folding scales whole output channels, so a mask may follow it.
            exact[name] = network.layers[name].masked(kept)
        rounded = network.with_layers(exact).to(torch.bfloat16).layers if fast else {}
        return cls(exact, {n: rounded[n] for n in exact} if fast else None, amount, achieved)


@dataclass(frozen=True)
class Chunk:
    """Results for n images.

    Attributes:
        dense_correct: Correctness of the dense network, bool, shape (n,).
        features: Input of the head's first linear layer, FP32, shape (n, features); without
            columns where the network has no such head.
        correct: Correctness of each variant, bool, shape (variants, n).
        recheck: Counts of what FP32 checked.
    """

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: torch.Tensor
    recheck: Fp32Recheck

    def cpu(self) -> Chunk:
        """Return the chunk with its tensors in main memory."""
        tensors = (self.dense_correct, self.features, self.correct)
        return Chunk(*(tensor.cpu() for tensor in tensors), self.recheck)

    @classmethod
    def joined(cls, shares: Sequence[Chunk]) -> Chunk:
        """Join the workers' shares, in the order of the images."""
        shares = [share for share in shares if len(share.features)]  # few images, many workers
        recheck = Fp32Recheck()
        for share in shares:
            recheck.add(share.recheck)
        return cls(
            torch.cat([share.dense_correct for share in shares]),
            torch.cat([share.features for share in shares]),
            torch.cat([share.correct for share in shares], dim=1),
            recheck,
        )


@dataclass(frozen=True)
class Walk:
    """The network to run, and what to keep of it.

    Attributes:
        cascade: Dense network.
        layers: Names of the layers that are pruned.
        features: Name of the operation whose value is kept for every image; None for none.
        bounds: For each amount, the margins below which FP32 decides.
    """

    cascade: Cascade
    layers: Sequence[str]
    features: str | None
    bounds: dict[float, torch.Tensor] = field(default_factory=dict)

    def run(
        self,
        dataset: ImageSet,
        variants: Sequence[PrunedVariants],
        batch_size: int,
        report: Callable[[int], object],
    ) -> Chunk:
        """Run the dense network and all variants; in FP32 this never waits for a GPU."""
        network = self.cascade.network
        graph = network.graph
        wanted = start_values(graph, self.layers) if variants else []
        wanted = [*wanted, graph.output, *([self.features] if self.features else [])]
        dense_correct, features, correct, recheck = [], [], [], Fp32Recheck()
        for images, labels in dataset.batches(batch_size):
            dense = network.run({graph.input: images}, wanted)
            none = images.new_empty(len(images), 0)
            features.append(dense[self.features] if self.features else none)
            dense_correct.append(dense[graph.output].argmax(dim=1) == labels)
            found = [
                self.cascade.predict(dense, v, self.bounds.get(v.amount), recheck) for v in variants
            ]
            correct += [torch.cat(found) == labels] if found else []
            report(len(images))
        return Chunk(
            torch.cat(dense_correct) if dense_correct else dataset.labels.bool(),
            torch.cat(features) if features else torch.empty(0, 0),
            torch.cat(correct, dim=1) if correct else torch.empty(0, len(dataset)),
            recheck,
        )
