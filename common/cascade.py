"""Branches in bf16, with FP32 to decide what bf16 cannot: FP32's predictions at bf16's speed.

The branches of :mod:`common.branching` run in bf16 where the CPU has instructions for it, at more
than twice FP32's rate. A bf16 prediction can differ from FP32's only where the two best logits lie
close together, so each image whose margin is within reach of the rounding error runs again in
FP32. That error is measured on a sample of the same images, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from common.branching import ALL_ROWS, FoldedNetwork, Trace, branch_logits, trace_dense
from common.data import Cifar10, normalize
from common.model import ResNet18

# A convolution of another kind or weight, or the linear layer's weight.
Part = Callable[[torch.Tensor], torch.Tensor] | torch.Tensor
CALIBRATION_IMAGES = 32
# The largest error seen on the calibration images, times this, is the bound. With 1,500 images and
# all 21 layers pruned by 90 %, bf16 alone changed 18 of 31,500 predictions, none at a margin of
# more than 0.24 of its bound, and 1.2 % of the predictions were decided again in FP32.
SAFETY_FACTOR = 3.0


def has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 in hardware (AVX-512 BF16, AMX)."""
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


@dataclass(frozen=True)
class Branches:
    """The variants of a network in which one layer alone is another.

    Attributes:
        exact: For each layer, in network order, what it becomes: in FP32.
        fast: The same in bf16; None where only FP32 runs.
    """

    exact: Mapping[str, Part]
    fast: Mapping[str, Part] | None


@dataclass
class Recomputation:
    """What the second, FP32 look at close bf16 predictions did.

    Attributes:
        predictions: All there were.
        recomputed: Those that were closer than the bound.
        changed: Those that FP32 decided otherwise.
        largest_change: The largest margin of a changed one, as a fraction of its bound. Near 1 it
            would say that the bound is too tight.
    """

    predictions: int = 0
    recomputed: int = 0
    changed: int = 0
    largest_change: float = 0.0

    def add(self, other: Recomputation) -> None:
        """Count another part of the scan in."""
        self.predictions += other.predictions
        self.recomputed += other.recomputed
        self.changed += other.changed
        self.largest_change = max(self.largest_change, other.largest_change)


@dataclass(frozen=True)
class Cascade:
    """The network in the precisions that its branches run in.

    Attributes:
        network: FP32.
        fast_network: bf16; None to run all in FP32.
    """

    network: FoldedNetwork
    fast_network: FoldedNetwork | None

    @classmethod
    def of(cls, model: ResNet18, fast: bool) -> Cascade:
        """Fold a model in eval mode, which is not changed; ``fast`` runs branches in bf16 first."""
        network = FoldedNetwork.of(model)
        return cls(network, network.to(torch.bfloat16) if fast else None)

    def predict(
        self,
        trace: Trace,
        branches: Branches,
        bounds: torch.Tensor | None,
        recomputation: Recomputation,
    ) -> torch.Tensor:
        """Return the classes (variants, n) that FP32 gives; nothing here waits for a GPU in FP32.

        Args:
            trace: The dense network's FP32 run on the batch of n images.
            branches: The variants.
            bounds: Of :meth:`measure_bounds`; not used where all runs in FP32.
            recomputation: Counted into.
        """
        if self.fast_network is None:
            return self._exact_logits(trace, branches).argmax(dim=2)
        best, classes = self._fast_logits(trace, branches).topk(2, dim=2)
        predictions = classes[..., 0]
        margin_to_bound = (best[..., 0] - best[..., 1]) / bounds[:, None]
        close = margin_to_bound < 1
        recomputation.predictions += close.numel()
        rows = {
            layer: mask.nonzero().flatten()
            for layer, mask in zip(branches.exact, close, strict=True)
            if mask.any()
        }
        if rows:
            parts = {layer: branches.exact[layer] for layer in rows}
            decided = branch_logits(self.network, trace, parts, rows).argmax(dim=1)
            changed = margin_to_bound[close][decided != predictions[close]]
            predictions[close] = decided
            largest = float(changed.max()) if len(changed) else 0.0
            recomputation.add(Recomputation(0, len(decided), len(changed), largest))
        return predictions

    def measure_bounds(self, dataset: Cifar10, branches: Branches, batch_size: int) -> torch.Tensor:
        """Return, a layer, the margin (variants,) below which a bf16 prediction may be wrong.

        It comes from the largest error of a difference of two logits on a few images: only
        differences decide a prediction, so an error that all logits share does not count.
        """
        # Evenly spaced, since an image folder is sorted by class.
        count = min(CALIBRATION_IMAGES, len(dataset))
        chosen = torch.linspace(0, len(dataset) - 1, count).long()
        largest = torch.full((len(branches.exact),), torch.finfo(torch.float32).tiny)
        for batch in dataset.images[chosen].split(batch_size):
            trace = trace_dense(self.network, normalize(batch))
            errors = self._fast_logits(trace, branches) - self._exact_logits(trace, branches)
            largest = largest.maximum((errors.amax(dim=2) - errors.amin(dim=2)).amax(dim=1))
        return SAFETY_FACTOR * largest

    def _exact_logits(self, trace: Trace, branches: Branches) -> torch.Tensor:
        return _all_logits(self.network, trace, branches.exact)

    def _fast_logits(self, trace: Trace, branches: Branches) -> torch.Tensor:
        return _all_logits(self.fast_network, trace, branches.fast)


def _all_logits(network: FoldedNetwork, trace: Trace, parts: Mapping[str, Part]) -> torch.Tensor:
    """Return the logits (variants, n, classes) of all variants on the whole batch."""
    logits = branch_logits(network, trace, parts, dict.fromkeys(parts, ALL_ROWS))
    return logits.view(len(parts), len(trace.images), -1)
