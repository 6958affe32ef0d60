"""Networks in bf16, with FP32 to decide what bf16 cannot: FP32's predictions at bf16's speed.

Networks run in bf16 where the CPU is faster in it: on AMD's Zen 4 and 5 at more than twice FP32's
rate. A bf16 prediction can differ from FP32's only where the two best logits lie close together, so
each image whose margin is within reach of the rounding error runs again in FP32. How large that
error gets is guessed from a sample of the same images: a heuristic, whose record every run keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from common.command.cli import log
from common.images.data import ImageSet, normalize
from common.network.branching import ALL_ROWS, FoldedNetwork, Trace, branch_logits, trace_dense
from common.network.resnet import ResNet18

# A convolution of another kind or weight, or the linear layer's weight.
Part = Callable[[torch.Tensor], torch.Tensor] | torch.Tensor
SAMPLE_IMAGES = 32
# The largest error seen on the sample, times this, is taken for the largest there is: nothing
# proves it. With 1,500 images and all 21 layers pruned by 90 %, bf16 alone changed 18 of 31,500
# predictions, none at a margin of more than 0.24 of it, and 1.2 % of the predictions were decided
# again in FP32.
SAFETY_FACTOR = 3.0
# From twice the largest error of the sample on, a change is warned of.
NEAR_BOUND = 2 / 3
BATCH_SIZE = 50


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
        """Count another part in."""
        self.predictions += other.predictions
        self.recomputed += other.recomputed
        self.changed += other.changed
        self.largest_change = max(self.largest_change, other.largest_change)

    def warn_if_near(self, advice: str = "; --precision fp32 decides all of them") -> None:
        """Warn, with advice, where a change came so near the bound that others may lie beyond."""
        if self.largest_change > NEAR_BOUND:
            log.warning(
                "bf16: FP32 changed a prediction at %.0f %% of the margin up to which it looks: "
                "some beyond may be wrong%s",
                100 * self.largest_change,
                advice,
            )


def bounds_of(fast: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the margins (networks,) below which a bf16 prediction may be wrong.

    Only differences of logits decide, so an error that all of an image's share does not count.

    Args:
        fast: bf16's logits on a sample, shape (networks, n, classes).
        exact: FP32's.
    """
    errors = fast - exact
    largest = (errors.amax(dim=2) - errors.amin(dim=2)).amax(dim=1)
    return SAFETY_FACTOR * largest.clamp_min(torch.finfo(torch.float32).tiny)


def decide(
    fast: torch.Tensor,
    bounds: torch.Tensor,
    look_again: Callable[[torch.Tensor], torch.Tensor],
    record: Recomputation,
) -> torch.Tensor:
    """Return the classes (networks, n) that FP32 gives.

    Args:
        fast: bf16's logits, shape (networks, n, classes).
        bounds: Of :func:`bounds_of`.
        look_again: Returns FP32's classes where a mask (bool, networks × n) says so, in its order.
        record: Counted into.
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
        record.add(Recomputation(0, len(decided), len(changed), largest))
    return predictions


# --- many branches of a network -------------------------------------------------------------------


@dataclass(frozen=True)
class Branches:
    """The variants of a network in which one layer alone is another.

    Attributes:
        exact: For each layer, in network order, what it becomes: in FP32.
        fast: The same in bf16; None where only FP32 runs.
    """

    exact: Mapping[str, Part]
    fast: Mapping[str, Part] | None


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
        """Fold a model in eval mode, which is not changed; ``fast`` runs bf16 first."""
        network = FoldedNetwork.of(model)
        return cls(network, network.to(torch.bfloat16) if fast else None)

    def predict(
        self,
        trace: Trace,
        branches: Branches,
        bounds: torch.Tensor | None,
        record: Recomputation,
    ) -> torch.Tensor:
        """Return the classes (variants, n) that FP32 gives; nothing here waits for a GPU in FP32.

        Args:
            trace: The dense network's FP32 run on the batch of n images.
            branches: The variants.
            bounds: Of :meth:`measure_bounds`; not used where all runs in FP32.
            record: Counted into.
        """
        if self.fast_network is None:
            return _all_logits(self.network, trace, branches.exact).argmax(dim=2)

        def look_again(close: torch.Tensor) -> torch.Tensor:
            rows = {
                layer: mask.nonzero().flatten()
                for layer, mask in zip(branches.exact, close, strict=True)
                if mask.any()
            }
            parts = {layer: branches.exact[layer] for layer in rows}
            return branch_logits(self.network, trace, parts, rows).argmax(dim=1)

        fast = _all_logits(self.fast_network, trace, branches.fast)
        return decide(fast, bounds, look_again, record)

    def measure_bounds(
        self, dataset: ImageSet, branches: Branches, batch_size: int
    ) -> torch.Tensor:
        """Return each variant's margin (variants,) below which a bf16 prediction may be wrong."""
        # Evenly spaced, since a whole split is sorted by class.
        count = min(SAMPLE_IMAGES, len(dataset))
        chosen = torch.linspace(0, len(dataset) - 1, count).long()
        found = []
        for batch in dataset.images[chosen].split(batch_size):
            trace = trace_dense(self.network, normalize(batch))
            fast = _all_logits(self.fast_network, trace, branches.fast)
            found.append(bounds_of(fast, _all_logits(self.network, trace, branches.exact)))
        return torch.stack(found).amax(dim=0)


def _all_logits(network: FoldedNetwork, trace: Trace, parts: Mapping[str, Part]) -> torch.Tensor:
    """Return the logits (variants, n, classes) of all variants on the whole batch."""
    logits = branch_logits(network, trace, parts, dict.fromkeys(parts, ALL_ROWS))
    return logits.view(len(parts), len(trace.images), -1)


# --- one network ----------------------------------------------------------------------------------


class Classifier:
    """One network that classifies whole sets of images.

    Args:
        model: In eval mode; not changed.
        sample: uint8 images to measure the rounding error on, on the model's device.
        fast: Run in bf16 first.
        record: Counted into.
    """

    @torch.inference_mode()
    def __init__(self, model: ResNet18, sample: torch.Tensor, fast: bool, record: Recomputation):
        cascade = Cascade.of(model, fast)
        self._exact, self._fast, self._record = cascade.network, cascade.fast_network, record
        if fast:
            images = sample[:SAMPLE_IMAGES]
            self._bounds = bounds_of(logits_of(self._fast, images), logits_of(self._exact, images))

    @torch.inference_mode()
    def find_correct(self, dataset: ImageSet) -> torch.Tensor:
        """Return per-image correctness (bool, shape (N,)) on the CPU, as FP32 gives it."""
        images = dataset.images

        def look_again(close: torch.Tensor) -> torch.Tensor:
            # All of them together: full batches run faster than the few of each batch.
            return logits_of(self._exact, images[close[0]])[0].argmax(dim=1)

        if self._fast is None:
            predictions = logits_of(self._exact, images).argmax(dim=2)
        else:
            fast = logits_of(self._fast, images)
            predictions = decide(fast, self._bounds, look_again, self._record)
        return (predictions[0] == dataset.labels).cpu()


def logits_of(network: FoldedNetwork, images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images (N, 3, H, W) to FP32 logits (1, N, classes)."""
    dtype = network.stem.weight.dtype
    traces = (trace_dense(network, normalize(x).to(dtype)) for x in images.split(BATCH_SIZE))
    return torch.cat([network.classify(trace.features) for trace in traces])[None]
