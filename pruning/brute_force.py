"""The usual way to scan: for each layer a deep copy, torch's own pruning, every image through all.

Kept as the reference that the fast scan is checked against and timed against.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import prune

from common import cli
from common.data import Cifar10, batches
from common.model import ResNet18, prunable_layers

BATCH_SIZE = 128


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


def search_brute_force(
    model: ResNet18,
    dataset: Cifar10,
    required: int,
    total_weights: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[int, int]:
    """Binary-search the linear layer's pruned weights with a deep copy and a full pass a step.

    Returns:
        The largest count found to keep ``required`` images correct, and the number of passes.
    """
    low, high, passes = 0, total_weights, 0
    while low < high:
        count, passes = (low + high + 1) // 2, passes + 1
        correct = classify_all(pruned_copy(model, "linear", count), dataset, layout)
        kept = int(correct.sum()) >= required
        low, high = (count, high) if kept else (low, count - 1)
    return low, passes
