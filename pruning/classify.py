"""How a pruned network classifies: in bf16 where that is fast, close cases again in FP32.

The same two looks as in :mod:`common.cascade`, for one network instead of many branches.
"""

from __future__ import annotations

import torch

from common.branching import FoldedNetwork, trace_dense
from common.cascade import CALIBRATION_IMAGES, SAFETY_FACTOR
from common.data import Cifar10, normalize
from common.model import ResNet18

BATCH_SIZE = 50


class Classifier:
    """A network folded for inference, and in bf16 the margin below which FP32 decides.

    Args:
        model: In eval mode; not changed.
        sample: uint8 images to measure the rounding error on, on the model's device.
        fast: Run in bf16 first.
    """

    @torch.inference_mode()
    def __init__(self, model: ResNet18, sample: torch.Tensor, fast: bool):
        self._exact = FoldedNetwork.of(model)
        self._fast = self._exact.to(torch.bfloat16) if fast else None
        if fast:
            images = normalize(sample[:CALIBRATION_IMAGES])
            errors = run(self._fast, images) - run(self._exact, images)
            # Only differences decide, so an error that all logits share does not count.
            self._bound = SAFETY_FACTOR * (errors.amax(dim=1) - errors.amin(dim=1)).max()

    @torch.inference_mode()
    def find_correct(self, dataset: Cifar10) -> torch.Tensor:
        """Return per-image correctness (bool, shape (N,)) on the CPU, as FP32 gives it."""
        first = self._exact if self._fast is None else self._fast
        logits = _run_in_batches(first, dataset.images)
        predictions = logits.argmax(dim=1)
        if self._fast is not None:
            best, second = logits.topk(2, dim=1).values.unbind(dim=1)
            # All of them together: full batches run faster than the few of each batch.
            close = (best - second < self._bound).nonzero().squeeze(1)
            if len(close):
                predictions[close] = _run_in_batches(self._exact, dataset.images[close]).argmax(1)
        return (predictions == dataset.labels).cpu()


def _run_in_batches(network: FoldedNetwork, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(network, normalize(batch)) for batch in images.split(BATCH_SIZE)])


def run(network: FoldedNetwork, images: torch.Tensor) -> torch.Tensor:
    """Map normalised images (N, 3, H, W) to FP32 logits (N, classes)."""
    trace = trace_dense(network, images.to(network.stem.weight.dtype))
    return network.classify(trace.features)
