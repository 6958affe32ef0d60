"""The usual way to scan: for each layer a deep copy, torch's own pruning, every image through all.

Kept as the reference that the fast scan is checked against and timed against.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from common.command import cli
from common.images.data import Cifar10, batches
from common.network.resnet import ResNet18, prunable_layers
from pruning.alone.scan import Scan, ScanResult

BATCH_SIZE = 128
# At most this many predictions may differ from brute force's.
MAX_FLIPS = 1e-3


@torch.inference_mode()
def classify_all(
    model: nn.Module, dataset: Cifar10, layout: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """Return per-image correctness (bool, shape (N,)), from NCHW batches as the usual script."""
    if not len(dataset):  # the share of one process too many
        return torch.empty(0, dtype=torch.bool)
    correct = [
        model(images.contiguous(memory_format=layout)).argmax(dim=1) == labels
        for images, labels in batches(dataset, BATCH_SIZE)
    ]
    return torch.cat(correct).cpu()


def pruned_copy(model: ResNet18, layer: str, amount: float) -> ResNet18:
    """Return a deep copy with one layer pruned by ``torch.nn.utils.prune.l1_unstructured``."""
    pruned = copy.deepcopy(model)
    module = prunable_layers(pruned)[layer]
    prune.l1_unstructured(module, "weight", amount)
    prune.remove(module, "weight")
    return pruned


def scan_brute_force(
    model: ResNet18,
    dataset: Cifar10,
    layers: Sequence[str],
    amount: float,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, torch.Tensor]:
    """Return per-image correctness of the model with each of ``layers`` pruned alone."""
    return {
        layer: classify_all(pruned_copy(model, layer, amount), dataset, layout)
        for layer in cli.progress(layers, "brute force", unit="layer")
    }


# --- against the scan ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What brute force found otherwise than the scan.

    Attributes:
        different: For each amount and layer the number of predictions that differ.
        predictions: In all.
        scan_seconds: None where part of the scan was done by an earlier run.
        brute_force_seconds: What this took.
    """

    different: dict[tuple[float, str], int]
    predictions: int
    scan_seconds: float | None
    brute_force_seconds: float


def verify(scan: Scan, scanned: ScanResult, scan_seconds: float | None) -> Verification:
    """Scan by brute force, each worker a share of the images, and compare image by image.

    Raises:
        UserError: More than 1 prediction in 1,000 differs.
    """
    started = time.perf_counter()
    test, workers = scan.images, scan.workers
    different, share = {}, workers.share_of(0, len(test), BATCH_SIZE)
    for amount in scan.amounts:
        found = scan_brute_force(scan.model, test.rows(share), scan.layers, amount)
        for layer, correct in found.items():
            unlike = int((scanned.correct[amount, layer][share] != correct).sum())
            different[amount, layer] = sum(workers.gather(unlike))
    seconds = time.perf_counter() - started
    total, flips = len(different) * len(test), sum(different.values())
    if flips > MAX_FLIPS * total:
        raise cli.UserError(f"the scan and brute force differ on {flips} of {total:,} predictions")
    return Verification(different, total, scan_seconds, seconds)
