"""The scan as an experiment: what it is of, against brute force, and what it says of each layer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from common.cli import UserError
from common.data import Cifar10, checksum
from common.evaluate import compare, measure_accuracy
from common.model import ResNet18, prunable_layers
from common.size import Layer
from common.workers import ALONE, Workers
from pruning.brute_force import BATCH_SIZE, scan_brute_force
from pruning.journal import Journal
from pruning.masks import pruned_count
from pruning.scan import ScanResult, scan

# Neighbours in the ranking whose difference McNemar's test cannot tell from chance.
TIE_P = 0.05
# At most this many predictions may differ from brute force's.
MAX_FLIPS = 1e-3


def choose_layers(model: ResNet18, patterns: Sequence[str] | None) -> list[str]:
    """Return the prunable layers that match any pattern (``layer4.*``), in network order.

    Raises:
        UserError: A pattern matches nothing.
    """
    names = list(prunable_layers(model))
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--layers {pattern}: matches none of {', '.join(names)}")
    return [n for n in names if patterns is None or any(fnmatchcase(n, p) for p in patterns)]


def scan_identity(
    model: ResNet18,
    dataset: Cifar10,
    layers: Sequence[str],
    amounts: Sequence[float],
    settings: dict,
) -> dict:
    """Return what a scan's results depend on, for its journal, named for the user."""
    return {
        "the checkpoint": checksum(model.state_dict().values()),
        "the test images": checksum([dataset.images, dataset.labels]),
        "the layers": list(layers),
        "the amounts": list(amounts),
        "torch": torch.__version__,
        "the number of threads": torch.get_num_threads(),
        **settings,
    }


def run_scan(
    model: ResNet18,
    dataset: Cifar10,
    layers: Sequence[str],
    amounts: Sequence[float],
    journal_path: Path,
    resume: bool,
    batch_size: int,
    fast: bool,
    workers: Workers = ALONE,
) -> tuple[ScanResult, float | None]:
    """Scan with a journal, and check that the model is as it was before.

    The first of the ``workers`` keeps the journal, for all of them.

    Returns:
        What the scan found, and its seconds; None where part of it was done by an earlier run.

    Raises:
        UserError: The workers have not the same model, images or settings.
    """
    settings = {
        "the batch size": batch_size,
        "the precision": "bf16 and FP32" if fast else "FP32",
        "the device": dataset.images.device.type,
        "the number of processes": workers.count,
    }
    identity = scan_identity(model, dataset, layers, amounts, settings)
    workers.require_same(identity)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        journal = {}
        if workers.is_first:
            journal = stack.enter_context(Journal(journal_path, identity, resume))
        finished = workers.broadcast(dict(journal))
        journal = journal if workers.is_first else finished
        result = scan(model, dataset, layers, amounts, journal, batch_size, fast, workers)
    seconds = time.perf_counter() - started
    if checksum(model.state_dict().values()) != identity["the checkpoint"]:
        raise AssertionError("the scan changed the model")
    return result, None if finished else seconds


# --- sensitivity ---------------------------------------------------------------------------------


def describe_structure(model: ResNet18, layers: Sequence[Layer]) -> dict:
    """Return totals by kind; ``parameters`` is their sum and the model's own count."""
    weights = {
        kind: sum(x.weights for x in layers if x.kind == kind) for kind in ("conv", "linear")
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(m.bias.numel() for m in prunable_layers(model).values() if m.bias is not None)
    return {
        "conv_weights": weights["conv"],
        "linear_weights": weights["linear"],
        "biases": biases,
        "batch_norm_parameters": total - biases - sum(weights.values()),
        "parameters": total,
        "macs": sum(layer.macs for layer in layers),
        "nonzeros": sum(layer.nonzeros for layer in layers),
    }


def sensitivity_entries(scan: ScanResult, shapes: dict[str, int]) -> list[dict]:
    """Return results.json's ``sensitivity``: one entry a layer and amount, against dense.

    Args:
        scan: What the scan found.
        shapes: For each layer its number of weights, to check the sparsity against.
    """
    entries = []
    for (amount, layer), correct in scan.correct.items():
        achieved = scan.achieved[amount, layer]
        # Weights that were zero before only add to what pruning asked for.
        if achieved < pruned_count(shapes[layer], amount) / shapes[layer] - 1e-9:
            raise AssertionError(f"{layer}: sparsity {achieved} is below the amount {amount}")
        entries.append(
            {
                "layer": layer,
                "amount": amount,
                "achieved": achieved,
                "accuracy": measure_accuracy(correct).as_dict(),
                "comparison": compare(scan.dense_correct, correct).as_dict(),
            }
        )
    return entries


def rank(scan: ScanResult, amount: float) -> list[dict]:
    """Rank the layers by drop, largest first, each tested against the next one on the same images.

    ``p_against_next`` is McNemar's; ``tied_with_next`` says that chance explains the difference.
    """
    correct = {layer: c for (a, layer), c in scan.correct.items() if a == amount}
    order = sorted(correct, key=lambda layer: int(correct[layer].sum()))
    entries = []
    for index, layer in enumerate(order):
        entry = {"layer": layer, "p_against_next": None, "tied_with_next": False}
        if index + 1 < len(order):
            p = compare(correct[layer], correct[order[index + 1]]).mcnemar_p
            entry |= {"p_against_next": p, "tied_with_next": p > TIE_P}
        entries.append(entry)
    return entries


def scan_results(
    scanned: ScanResult, model: ResNet18, layers: Sequence[Layer], amounts: Sequence[float]
) -> dict:
    """Return the scan's part of results.json."""
    result = {
        "baseline": measure_accuracy(scanned.dense_correct).as_dict(),
        "structure": describe_structure(model, layers),
        "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in layers],
        "sensitivity": sensitivity_entries(scanned, {x.name: x.weights for x in layers}),
        "ranking": [{"amount": amount, "layers": rank(scanned, amount)} for amount in amounts],
    }
    if scanned.recomputation is not None:
        result["bf16"] = asdict(scanned.recomputation)
    return result


def verify(
    scanned: ScanResult,
    model: ResNet18,
    dataset: Cifar10,
    scan_seconds: float | None,
    workers: Workers = ALONE,
) -> dict:
    """Scan by brute force and compare image by image.

    Args:
        scanned: What the scan found.
        model: Not changed.
        dataset: The scan's images.
        scan_seconds: What the scan took, for the speed-up; None where it was resumed.
        workers: Take a share of the images each.

    Returns:
        results.json's ``verification``.

    Raises:
        UserError: More than 1 prediction in 1,000 differs.
    """
    started = time.perf_counter()
    different, share = {}, workers.share_of(0, len(dataset), BATCH_SIZE)
    for amount in dict.fromkeys(amount for amount, _ in scanned.correct):
        layers = [layer for a, layer in scanned.correct if a == amount]
        for layer, correct in scan_brute_force(model, dataset.rows(share), layers, amount).items():
            unlike = int((scanned.correct[amount, layer][share] != correct).sum())
            different[amount, layer] = sum(workers.gather(unlike))
    seconds = time.perf_counter() - started
    total = len(different) * len(dataset)
    if sum(different.values()) > MAX_FLIPS * total:
        raise UserError(
            f"the scan and brute force differ on {sum(different.values())} of {total:,} predictions"
        )
    return {
        "predictions": total,
        "different": sum(different.values()),
        "by_layer": [
            {"amount": amount, "layer": layer, "different": count}
            for (amount, layer), count in different.items()
        ],
        "scan_seconds": scan_seconds,
        "brute_force_seconds": seconds,
        "speedup": seconds / scan_seconds if scan_seconds else None,
    }
