"""The steps of pruning.py after the scan: each prunes, writes, reads back, and tells what it found.

They return their part of results.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.resnet import prunable_layers
from pruning.alone.linear import search_linear
from pruning.alone.scan import Scan, ScanResult
from pruning.channels import search as channels
from pruning.channels.speed import measure_models
from pruning.files import saved
from pruning.masks import copy_without, l1_mask
from pruning.report import results, search_results
from pruning.together.found import best_of, search_all, search_finetuned
from pruning.together.recalibration import RECALIBRATION_IMAGES
from pruning.together.search import ModelSearch
from training.loop.distillation import Training


def read_calibration(inputs: Inputs, scope: str | None, recalibrated: bool) -> ImageSet | None:
    """Read the training images that the search over many layers needs, to the network's device.

    Returns:
        Those for batch-norm statistics or, of whole channels, to make up for those that go; None
        where neither is done.

    Raises:
        UserError: There are too few: better found before the scan than after it.
    """
    if scope == channels.SCOPE:
        count = channels.CALIBRATION_IMAGES
    elif recalibrated:
        count = RECALIBRATION_IMAGES
    else:
        return None
    return inputs.load_training(count).to(inputs.test.images.device)


def prune_linear(scan: Scan, scanned: ScanResult, tolerance: float, seed: int, path: Path) -> dict:
    """Search how far the linear layer can go, write that model, and confirm what was written.

    Raises:
        UserError: The reloaded model is not the one that the search measured.
    """
    model, images, labels = scan.model, scan.images, scan.images.labels.cpu()
    started = time.perf_counter()
    search = search_linear(model.linear, scanned.features, labels, tolerance, seed)
    seconds = time.perf_counter() - started
    kept = l1_mask(model.linear.weight.cpu(), search.found)
    reloaded, sizes = saved.save_pruned(model, copy_without(model, {"linear": kept}), path)
    logits = scanned.features @ reloaded.linear.weight.detach().T + reloaded.linear.bias.detach()
    expected = logits.argmax(dim=1) == labels
    predictions = predict(reloaded.to(images.images.device), images, scan.batch_size, "confirm")
    confirmed = saved.confirm(scanned.dense_correct, expected, predictions == labels)
    sparse = f"{100 * saved.TIMED_AMOUNT:g} % zeros everywhere"
    kept_last = {  # whichever weights go: kernels take the same time
        name: torch.arange(layer.weight.numel()).view_as(layer.weight)
        >= saved.TIMED_AMOUNT * layer.weight.numel()
        for name, layer in prunable_layers(model).items()
    }
    models = {"dense": model, sparse: copy_without(model, kept_last)}
    timings = saved.time_zeros(models, images.images)
    return {
        "linear_search": results.describe_linear(search, seconds, confirmed),
        "savings": results.describe_savings(sizes, model, timings),
    }


def prune_together(
    search: ModelSearch, allocations: Sequence[str], training: Training | None, path: Path
) -> dict:
    """Search how far many layers can go together, write the sparsest model, and confirm it.

    One without channels is timed beside the dense one.

    Raises:
        UserError: The reloaded model is not the one that the search measured.
    """
    started = time.perf_counter()
    found = search_all(search, allocations)
    best = best_of(search, found)
    if training is not None:
        found.append(search_finetuned(search, best, training))
        best = best_of(search, found)
    seconds = time.perf_counter() - started
    rows = [search_results.describe_found(search, one) for one in found]
    images, dense_correct = search.held_out.images, search.held_out.dense_correct
    expected = search.classifier(best.model).find_correct(images)
    reloaded, sizes = saved.save_pruned(search.model, best.model, path)
    predictions = predict(reloaded.to(images.images.device), images, description="confirm")
    row = rows[found.index(best)]
    same = ("scope", "allocation", "recalibrated", "finetune_epochs", "macs_kept")
    told = {
        "model_search": rows,
        "model_search_seconds": seconds,
        "model_saved": {
            **{name: row[name] for name in same},
            "sparsity": row["max_sparsity"],
            **saved.confirm(dense_correct, expected, predictions == images.labels.cpu()),
            **sizes,
            "latency": saved.time_zeros({"dense": search.model, "pruned": reloaded}, images.images),
        },
    }
    if search.scope == channels.SCOPE:
        models = measure_models(search.model, reloaded, search.calibration, images)
        told["slim"] = search_results.describe_slim(reloaded, models)
    if search.fast:
        search.record.warn_if_near()
        told["model_search_bf16"] = asdict(search.record)
    return told
