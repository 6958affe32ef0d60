"""The steps of pruning.py after the scan: each prunes, writes, reads back, and tells what it found.

They return their part of results.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.images.data import Cifar10
from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.checkpoint import load_model
from common.network.resnet import ResNet18
from pruning.alone.linear import search_linear
from pruning.alone.scan import Scan, ScanResult
from pruning.channels.search import ChannelSearch
from pruning.channels.speed import measure_models
from pruning.files import saved
from pruning.masks import copy_without, l1_mask
from pruning.report import results, search_results
from pruning.together.found import best_of, search_all, search_finetuned
from pruning.together.recalibration import RECALIBRATION_IMAGES
from pruning.together.search import ModelSearch


@dataclass(frozen=True)
class Training:
    """What the search over many layers needs beside the test images.

    Attributes:
        recalibration: uint8 images (N, 3, 32, 32) for batch-norm statistics; None: none are
            re-estimated.
        finetuning: To train on; None: nothing is trained.
        epochs: Of that training.
    """

    recalibration: torch.Tensor | None
    finetuning: Cifar10 | None
    epochs: int | None

    @classmethod
    def read(
        cls, inputs: Inputs, recalibrated: bool, epochs: int | None, count: int | None
    ) -> Training:
        """Read it to the device of ``inputs``; ``count`` images to train on, None for all.

        Raises:
            UserError: There are too few: better found before the scan than after it.
        """
        device = inputs.test.images.device
        recalibration = finetuning = None
        if recalibrated:
            recalibration = inputs.load_training(RECALIBRATION_IMAGES).images.to(device)
        if epochs:
            finetuning = inputs.load_training(count).to(device)
        return cls(recalibration, finetuning, epochs)


def prune_linear(scan: Scan, scanned: ScanResult, tolerance: float, seed: int, path: Path) -> dict:
    """Search how far the linear layer can go, write that model, and confirm what was written.

    Raises:
        UserError: The reloaded model is not the one that the search measured.
    """
    model, labels = scan.model, scan.images.labels.cpu()
    search = search_linear(model.linear, scanned.features, labels, tolerance, seed)
    kept = l1_mask(model.linear.weight.cpu(), search.found)
    reloaded, sizes = saved.save_pruned(model, copy_without(model, {"linear": kept}), path)
    logits = scanned.features @ reloaded.linear.weight.detach().T + reloaded.linear.bias.detach()
    confirmed = saved.Confirmation.of(
        _find_correct(scan, reloaded), logits.argmax(dim=1) == labels, scanned.dense_correct
    )
    timings = saved.time_zeros(model, saved.zero_everywhere(model), scan.images.images)
    return {
        "linear_search": results.describe_linear(search, confirmed),
        "savings": results.describe_savings(sizes, model, timings),
    }


def prune_together(
    scan: Scan, search: ModelSearch, allocations: Sequence[str], training: Training, path: Path
) -> dict:
    """Search how far many layers can go together, write the sparsest model, and confirm it.

    Raises:
        UserError: The reloaded model is not the one that the search measured.
    """
    started = time.perf_counter()
    found = search_all(search, allocations)
    best = best_of(search, found)
    if training.epochs:
        found.append(search_finetuned(search, best, training.finetuning, training.epochs))
        best = best_of(search, found)
    seconds = time.perf_counter() - started
    held_out = search.held_out
    expected = search.classifier(best.model).find_correct(held_out.images)
    reloaded, sizes = saved.save_pruned(search.model, best.model, path)
    correct = predict(reloaded.to(scan.workers.device), held_out.images, description="confirm")
    confirmed = saved.Confirmation.of(
        correct == held_out.images.labels.cpu(), expected, held_out.dense_correct
    )
    timings = saved.time_zeros(search.model, reloaded, held_out.images.images)
    told = {
        "model_search": search_results.describe_search(search, found),
        "model_search_seconds": seconds,
        "model_saved": search_results.describe_saved(search, best, confirmed, sizes, timings),
    }
    if search.fast:
        search.record.warn_if_near()
        told["model_search_bf16"] = asdict(search.record)
    return told


def remove_channels(
    scan: Scan, search: ChannelSearch, training: Training, calibration: Cifar10, path: Path
) -> dict:
    """Search how many channels can go, write that network, and time it beside the dense one.

    Raises:
        UserError: The reloaded model is not the one that the search measured.
    """
    told = prune_together(scan, search, (), training, path)
    reloaded = load_model(path)
    models = measure_models(search.model, reloaded, calibration, search.held_out.images)
    return told | {"slim": search_results.describe_slim(reloaded, models)}


def _find_correct(scan: Scan, model: ResNet18) -> torch.Tensor:
    """Return which of the scan's images a model gets right (bool, on the CPU)."""
    images = scan.images
    predictions = predict(model.to(images.images.device), images, scan.batch_size, "confirm")
    return predictions == images.labels.cpu()
