"""The steps of pruning.py after the scan: each prunes, writes a file, reads it back, measures it.

They return their part of results.json, or raise a UserError if the file is not what was measured.
"""

import time
from dataclasses import asdict
from pathlib import Path

from common.command.argument_types import AtMost
from common.command.cli import UserError
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.tracing import trace_network
from pruning.alone.linear import search_linear
from pruning.alone.scan import Scan, ScanResult
from pruning.files import saved
from pruning.masks import copy_without, l1_masks
from pruning.report.results import describe_found
from pruning.together.found import best_of, search_all, search_finetuned
from pruning.together.recalibration import RECALIBRATION_IMAGES, batch_norms
from pruning.together.search import ModelSearch
from training.loop.distillation import Training


def read_calibration(inputs: Inputs) -> ImageSet:
    """Read the training images to re-estimate batch norms with; all if there are fewer than wanted.

    Without batch norms in the network, a UserError is raised.
    """
    if not batch_norms(inputs.model):
        raise UserError("--recalibrate-bn: the network has no batch norms")
    return inputs.load_training(AtMost(RECALIBRATION_IMAGES)).to(inputs.test.images.device)


def prune_linear(scan: Scan, scanned: ScanResult, tolerance: float, seed: int, path: Path) -> dict:
    """Search how far the linear layers can go, write that model, and confirm the file."""
    model, images, labels, head = scan.model, scan.images, scan.images.labels.cpu(), scan.head
    started = time.perf_counter()
    search = search_linear(head, scanned.features, labels, tolerance, seed)
    seconds = time.perf_counter() - started
    pruned = copy_without(model, head.masks_at(search.found))
    reloaded, sizes = saved.save_pruned(model, pruned, path)
    expected = head.classify(trace_network(reloaded, images.shape), scanned.features)
    predictions = predict(reloaded.to(images.images.device), images, scan.batch_size, "confirm")
    confirmed = saved.confirm(scanned.dense_correct, expected == labels, predictions == labels)
    sparse = copy_without(model, l1_masks(scan.weights, saved.TIMED_AMOUNT))
    models = {"dense": model, f"{100 * saved.TIMED_AMOUNT:g} % zeros in every layer": sparse}
    share = head.total / sum(weight.numel() for weight in scan.weights.values())
    return {
        "linear_search": search.as_dict() | {"seconds": seconds, "confirmed": confirmed},
        "savings": {**sizes, "linear_share": share, "latency": saved.time_zeros(models, images)},
    }


def prune_together(search: ModelSearch, training: Training | None, path: Path) -> dict:
    """Search how far many layers can go together; write the sparsest model, and confirm it."""
    started = time.perf_counter()
    found = search_all(search)
    best = best_of(search, found)
    if training is not None:
        found.append(search_finetuned(search, best, training))
        best = best_of(search, found)
    seconds = time.perf_counter() - started
    rows = [describe_found(search, one) for one in found]
    images, dense_correct = search.held_out.images, search.held_out.dense_correct
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
            **saved.confirm(dense_correct, best.correct, predictions == images.labels.cpu()),
            **sizes,
            "latency": saved.time_zeros({"dense": search.model, "pruned": reloaded}, images),
        },
    }
    if search.fast:
        search.record.warn_if_near()
        told["model_search_bf16"] = asdict(search.record)
    return told
