"""The steps of pruning.py after the scan: each prunes, writes a file, reads it back, measures it.

They return their part of results.json, or raise a UserError if the file is not what was measured.
A file is a plain checkpoint with the original names. Its zeros still take four bytes each; their
worth shows once the file is compressed.
"""

import copy
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common.command.argument_types import AtMost
from common.command.cli import UserError
from common.files.atomic import replace_file
from common.files.untrusted import read_untrusted, serialize
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, time_interleaved
from common.network.tracing import trace_network
from common.search.budget import EvaluationSplit
from pruning.alone.linear import search_linear
from pruning.alone.scan import Scan, ScanResult
from pruning.masks import copy_without, l1_masks
from pruning.report.results import describe_found
from pruning.together.found import best_of, search_all, search_finetuned
from pruning.together.recalibration import RECALIBRATION_IMAGES, batch_norms
from pruning.together.search import ModelSearch
from training.loop.distillation import Training

# At most this many predictions of the reloaded model may differ from the search's.
MAX_FLIPS = 1e-3
TIMED_BATCH_SIZE, TIMED_AMOUNT = 16, 0.9


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
    level, searched = search_linear(head, scanned.features, labels, tolerance, seed)
    seconds = time.perf_counter() - started
    pruned = copy_without(model, head.masks_at(level))
    expected = head.classify(trace_network(pruned, images.shape), scanned.features) == labels
    split = EvaluationSplit(images, scanned.dense_correct)
    confirmed, sizes = write_model(scan, pruned, path, split, expected)
    sparse = copy_without(model, l1_masks(scan.weights, TIMED_AMOUNT))
    models = {"dense": model, f"{100 * TIMED_AMOUNT:g} % zeros in every layer": sparse}
    share = head.total / sum(weight.numel() for weight in scan.weights.values())
    return {
        "linear_search": searched | {"seconds": seconds, "confirmed": confirmed},
        "savings": {**sizes, "linear_share": share, "latency": time_zeros(models, images)},
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
    confirmed, sizes = write_model(search.scan, best.model, path, search.held_out, best.correct)
    models = {"dense": search.model, "pruned": best.model}
    row = rows[found.index(best)]
    same = ("scope", "allocation", "recalibrated", "finetune_epochs", "macs_kept")
    told = {
        "model_search": rows,
        "model_search_seconds": seconds,
        "model_saved": {
            **{name: row[name] for name in same},
            "sparsity": row["max_sparsity"],
            **confirmed,
            **sizes,
            "latency": time_zeros(models, search.held_out.images),
        },
    }
    if search.scan.fast:
        search.record.warn_if_near()
        told["model_search_bf16"] = asdict(search.record)
    return told


def write_model(
    scan: Scan, pruned: nn.Module, path: Path, split: EvaluationSplit, expected: torch.Tensor
) -> tuple[dict, dict[str, int]]:
    """Write a pruned model, read it back, and hold its correct images against those ``expected``.

    Return its accuracy and comparison on the split, and bytes of its file and of the scan's model,
    plain and compressed by zlib. If more than 1 image in 1,000 differs, raise a UserError.
    """
    plain, content = (
        serialize({name: t.cpu().contiguous() for name, t in model.state_dict().items()})
        for model in (scan.model, pruned)
    )
    replace_file(path, content)
    read, images = read_untrusted(path), split.images
    if any(not torch.equal(t.cpu(), read[name]) for name, t in pruned.state_dict().items()):
        raise AssertionError(f"{path.name} gives back other tensors than were saved")
    reloaded = copy.deepcopy(pruned).to(images.images.device)
    reloaded.load_state_dict(read)
    correct = predict(reloaded, images, scan.batch_size, "confirm") == images.labels.cpu()
    unlike = int((correct != expected).sum())
    if unlike > max(1, MAX_FLIPS * len(correct)):
        raise UserError(f"the reloaded model differs from the search on {unlike} images")
    confirmed = Paired.of(split.dense_correct, correct).as_dict()
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter while it works
        # Level 1, as random mantissas gain nothing from more.
        small = list(pool.map(lambda data: len(zlib.compress(data, 1)), (plain, content)))
    return confirmed | {"images_unlike_search": unlike}, {
        "dense_bytes": len(plain),
        "dense_compressed_bytes": small[0],
        "pruned_bytes": len(content),
        "pruned_compressed_bytes": small[1],
    }


def time_zeros(models: Mapping[str, nn.Module], images: ImageSet) -> list[dict]:
    """Time models in turns on the CPU, on some of the images; return entries of results.json."""
    contenders = []
    for name, model in models.items():
        laid_out = copy.deepcopy(model).cpu().to(memory_format=torch.channels_last)
        contenders.append(Contender(name, torch.inference_mode()(laid_out)))
    batch = images.normalize(images.images[:TIMED_BATCH_SIZE].cpu())
    timings = time_interleaved(contenders, batch, (TIMED_BATCH_SIZE,), seconds_per_batch_size=1.5)
    return [{"name": name} | timing.as_dict() for name, (timing,) in timings.items()]
