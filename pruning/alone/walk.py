"""One walk over the images: the dense network, and all that branches off it.

Each batch runs through the dense network once and every pruned variant branches off it
(:mod:`common.network.branching`), in bf16 where that is fast, with FP32's predictions
(:mod:`common.network.cascade`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from common.images.data import ImageSet, batches
from common.network.branching import Convolution, FoldedNetwork, trace_dense
from common.network.cascade import Branches, Cascade, Recomputation
from common.network.resnet import ResNet18, prunable_layers
from pruning.masks import l1_mask, pruned_count


@dataclass(frozen=True)
class Variants(Branches):
    """The network with each of some layers pruned alone by one amount.

    Attributes:
        amount: Fraction asked for.
        achieved: For each layer, in network order, the fraction of zeros.
    """

    amount: float
    achieved: dict[str, float]

    @classmethod
    def of(cls, model: ResNet18, layers: Sequence[str], amount: float, fast: bool) -> Variants:
        """Prune each of ``layers`` of ``model``, which is not changed and may be on any device."""
        network, modules = FoldedNetwork.of(model), prunable_layers(model)
        convolutions, exact, achieved = network.convolutions(), {}, {}
        for name in layers:
            weight = modules[name].weight.detach()
            total = weight.numel()
            kept = l1_mask(weight.cpu(), pruned_count(total, amount)).to(weight.device)
            pruned = weight.masked_fill(~kept, 0)
            achieved[name] = (total - int(pruned.count_nonzero())) / total
            # Folding scales whole channels, so it does not matter that the mask comes after it.
            exact[name] = convolutions[name].masked(kept) if name in convolutions else pruned
        if not fast:
            return cls(exact, None, amount, achieved)
        rounded = {
            name: part.to(torch.bfloat16) if isinstance(part, Convolution) else part
            for name, part in exact.items()
        }
        return cls(exact, rounded, amount, achieved)


@dataclass(frozen=True)
class Chunk:
    """A part of the scan: correctness (variants, n) and what the dense network gave, (n,)."""

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: torch.Tensor
    recomputation: Recomputation

    def cpu(self) -> Chunk:
        """Return the chunk with its tensors in main memory."""
        tensors = (self.dense_correct, self.features, self.correct)
        return Chunk(*(tensor.cpu() for tensor in tensors), self.recomputation)

    @classmethod
    def joined(cls, shares: Sequence[Chunk]) -> Chunk:
        """Put the workers' shares together, in the order of the images."""
        shares = [share for share in shares if len(share.features)]  # few images, many workers
        recomputation = Recomputation()
        for share in shares:
            recomputation.add(share.recomputation)
        return cls(
            torch.cat([share.dense_correct for share in shares]),
            torch.cat([share.features for share in shares]),
            torch.cat([share.correct for share in shares], dim=1),
            recomputation,
        )


@dataclass
class Walk:
    """The network and, for each amount, the bf16 margins below which FP32 decides."""

    cascade: Cascade
    bounds: dict[float, torch.Tensor] = field(default_factory=dict)

    def run(
        self,
        dataset: ImageSet,
        variants: Sequence[Variants],
        batch_size: int,
        report: Callable[[int], object],
    ) -> Chunk:
        """Run the dense network and all variants; nothing here waits for a GPU."""
        dense_correct, features, correct, recomputation = [], [], [], Recomputation()
        for images, labels in batches(dataset, batch_size):
            trace = trace_dense(self.cascade.network, images)
            features.append(trace.features)
            dense = self.cascade.network.classify(trace.features)
            dense_correct.append(dense.argmax(dim=1) == labels)
            found = [
                self.cascade.predict(trace, v, self.bounds.get(v.amount), recomputation)
                for v in variants
            ]
            correct += [torch.cat(found) == labels] if found else []
            report(len(images))
        return Chunk(
            torch.cat(dense_correct) if dense_correct else dataset.labels.bool(),
            torch.cat(features) if features else dataset.labels.float(),
            torch.cat(correct, dim=1) if correct else torch.empty(0, len(dataset)),
            recomputation,
        )
