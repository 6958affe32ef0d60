"""The sensitivity scan: every layer pruned alone, its correctness image by image.

The branches of :mod:`pruning.branching` run in bf16 where the CPU has instructions for it, at more
than twice FP32's rate. A bf16 prediction can differ from FP32's only where the two best logits lie
close together, so each image whose margin is within reach of the rounding error runs again in
FP32. That error is measured on a sample of the same images, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common import cli
from common.data import Cifar10, normalize
from common.model import ResNet18, prunable_layers
from pruning.branching import (
    ALL_ROWS,
    Convolution,
    FoldedNetwork,
    Trace,
    branch_logits,
    trace_dense,
)
from pruning.journal import Journal
from pruning.masks import prune_weight, sparsity

# One entry of the journal: all layers, all amounts, on this many images.
CHUNK_IMAGES = 256
CALIBRATION_IMAGES = 64
# The largest error seen on the calibration images, times this, bounds the others'.
SAFETY_FACTOR = 1.5


@dataclass(frozen=True)
class Variants:
    """The network with each of some layers pruned alone by one amount.

    Attributes:
        amount: Fraction asked for.
        achieved: For each layer, in network order, the fraction of zeros.
        exact: For each layer what it becomes: a folded FP32 convolution, or a linear weight.
        fast: The same in bf16; None where only FP32 runs.
    """

    amount: float
    achieved: dict[str, float]
    exact: dict[str, Convolution | torch.Tensor]
    fast: dict[str, Convolution | torch.Tensor] | None

    @classmethod
    def of(cls, model: ResNet18, layers: Sequence[str], amount: float, fast: bool) -> Variants:
        """Prune each of ``layers`` of ``model``, which is not changed and may be on any device."""
        device = model.linear.weight.device
        exact, achieved = {}, {}
        for name in layers:
            module = prunable_layers(model)[name]
            weight = prune_weight(module.weight.cpu(), amount)
            achieved[name] = sparsity(weight)
            weight = weight.to(device)
            if isinstance(module, nn.Conv2d):
                norm = model.get_submodule(norm_of(name))
                exact[name] = Convolution.folded(module, norm, weight)
            else:
                exact[name] = weight
        low = {n: v.to(torch.bfloat16) if isinstance(v, Convolution) else v for n, v in exact.items()}
        return cls(amount, achieved, exact, low if fast else None)


def norm_of(convolution: str) -> str:
    """Return the name of the batch norm after a convolution: conv1 → bn1, shortcut.0 → .1."""
    stem, _, last = convolution.rpartition(".")
    return f"{stem}.1" if last == "0" else convolution.replace("conv", "bn")


@dataclass(frozen=True)
class ScanResult:
    """What the scan found, image by image, in the order of the dataset.

    Attributes:
        dense_correct: bool, shape (N,).
        features: FP32, shape (N, channels): the linear layer's input.
        correct: For each amount and layer: bool, shape (N,).
        achieved: For each amount and layer the fraction of zeros.
        recomputed: How many bf16 predictions were decided again in FP32.
        predictions: How many predictions there were in all.
    """

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: dict[tuple[float, str], torch.Tensor]
    achieved: dict[tuple[float, str], float]
    recomputed: int
    predictions: int


class Scanner:
    """Scans a dataset with one model.

    Args:
        model: In eval mode; not changed.
        layers: To prune, in network order.
        amounts: To prune each by.
        fast: Run branches in bf16 and decide the close cases in FP32.
    """

    def __init__(
        self, model: ResNet18, layers: Sequence[str], amounts: Sequence[float], fast: bool
    ):
        self._layers = list(layers)
        self._network = FoldedNetwork.of(model)
        self._fast_network = self._network.to(torch.bfloat16) if fast else None
        self._variants = [Variants.of(model, layers, amount, fast) for amount in amounts]
        self._bounds: dict[float, torch.Tensor] = {}

    @torch.inference_mode()
    def run(self, dataset: Cifar10, batch_size: int, journal: Journal) -> ScanResult:
        """Scan every layer at every amount; finished chunks of images come from the journal."""
        self._calibrate(dataset, batch_size, journal)
        chunks = [(i, min(i + CHUNK_IMAGES, len(dataset))) for i in range(0, len(dataset), CHUNK_IMAGES)]
        dense_correct, features, found = [], [], []
        with cli.progress(None, "scan", total=len(dataset), unit="image") as bar:
            for first, last in chunks:
                key = f"images {first}-{last}"
                chunk = Cifar10(dataset.images[first:last], dataset.labels[first:last])
                correct, chunk_features, value = self._scan_chunk(chunk, batch_size, key in journal, bar)
                dense_correct.append(correct)
                features.append(chunk_features)
                if key not in journal:
                    journal[key] = value
                found.append(journal[key])
        raise NotImplementedError
