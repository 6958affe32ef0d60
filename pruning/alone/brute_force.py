"""The usual way: a deep copy, torch's own pruning, and every image through the whole network.

This repeats for each layer, and for each step of the search over the linear layers. It is the
reference that the fast scan and search are checked and timed against.
"""

import copy
import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import prune

from common.command import cli
from common.images.data import ImageSet
from pruning.alone.linear import binary_search, required_correct
from pruning.alone.scan import Scan, ScanResult

BATCH_SIZE = 128
# At most this many predictions may differ from brute force's.
MAX_FLIPS = 1e-3


@torch.inference_mode()
def classify_all(model: nn.Module, dataset: ImageSet) -> torch.Tensor:
    """Return per-image correctness (bool, shape (N,)), from NCHW batches as the usual script."""
    if not len(dataset):  # the share of one process too many
        return torch.empty(0, dtype=torch.bool)
    batches = dataset.batches(BATCH_SIZE)
    return torch.cat([model(x.contiguous()).argmax(dim=1) == y for x, y in batches]).cpu()


def pruned_copy(model: nn.Module, amounts: Mapping[str, float | int]) -> nn.Module:
    """Return a deep copy with some layers pruned by ``torch.nn.utils.prune.l1_unstructured``."""
    pruned = copy.deepcopy(model)
    for layer, amount in amounts.items():
        module = pruned.get_submodule(layer)
        prune.l1_unstructured(module, "weight", amount)
        prune.remove(module, "weight")
    return pruned


def verify(scan: Scan, scanned: ScanResult, tolerance: float) -> dict:
    """Scan and search the usual way, each worker a share of the images; compare image by image.

    Return the ``verification`` of results.json without the time that the fast way took. If more
    than 1 prediction in 1,000 differs, raise a UserError.
    """
    started = time.perf_counter()
    model, workers, total = scan.model, scan.workers, len(scan.images)
    share = workers.share_of(0, total, BATCH_SIZE)
    images = scan.images.rows(share)
    by_layer = []
    for amount, layer in cli.progress(scanned.correct, "brute force", unit="layer"):
        correct = classify_all(pruned_copy(model, {layer: amount}), images)
        unlike = int((scanned.correct[amount, layer][share] != correct).sum())
        different = sum(workers.gather(unlike))
        by_layer.append({"amount": amount, "layer": layer, "different": different})

    predictions, flips = len(by_layer) * total, sum(row["different"] for row in by_layer)
    if flips > MAX_FLIPS * predictions:
        raise cli.UserError(
            f"the scan and brute force differ on {flips} of {predictions:,} predictions"
        )
    verification = {"different": flips, "predictions": predictions, "by_layer": by_layer}
    if (head := scan.head) is not None:
        with cli.progress(None, "brute-force search", unit="step") as bar:

            def correct_at(level: int) -> int:
                correct = classify_all(pruned_copy(model, head.counts_at(level)), images)
                bar.update()
                return sum(workers.gather(int(correct.sum())))

            required = required_correct(correct_at(0), total, tolerance)
            found, _ = binary_search(correct_at, head.levels, required)
        verification["pruned_weights"] = sum(head.counts_at(found).values())
    return verification | {"brute_force_seconds": time.perf_counter() - started}
