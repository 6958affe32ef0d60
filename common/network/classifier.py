"""Whole sets of images classified by one network, with FP32's predictions at bf16's speed."""

import torch

from common.images.data import ImageSet
from common.network.cascade import SAMPLE_IMAGES, Fp32Recheck, bounds_of, decide
from common.network.execution import Network

BATCH_SIZE = 50


class Classifier:
    """A classifier of whole sets of images.

    Args:
        network: FP32 network, on the images' device.
        sample: Images to measure the rounding error on.
        fast: Whether to run in bf16 first.
        record: Counts to add to.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, sample: ImageSet, fast: bool, record: Fp32Recheck):
        self._exact, self._record = network, record
        self._fast = network.to(torch.bfloat16) if fast else None
        if fast:
            images = sample.rows(slice(SAMPLE_IMAGES))
            self._bounds = bounds_of(logits_of(self._fast, images), logits_of(self._exact, images))

    @torch.inference_mode()
    def find_correct(self, dataset: ImageSet) -> torch.Tensor:
        """Return per-image correctness (bool, shape (N,)) on the CPU, as FP32 gives it."""

        def look_again(close: torch.Tensor) -> torch.Tensor:
            # All of them together: full batches run faster than the few of each batch.
            return logits_of(self._exact, dataset.rows(close[0]))[0].argmax(dim=1)

        if self._fast is None:
            predictions = logits_of(self._exact, dataset).argmax(dim=2)
        else:
            fast = logits_of(self._fast, dataset)
            predictions = decide(fast, self._bounds, look_again, self._record)
        return (predictions[0] == dataset.labels).cpu()


def logits_of(network: Network, dataset: ImageSet) -> torch.Tensor:
    """Return FP32 logits (1, N, classes)."""
    return torch.cat([network(images) for images, _ in dataset.batches(BATCH_SIZE)])[None]
