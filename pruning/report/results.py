"""The parts of results.json about each layer alone and about the linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from torch import nn

from common.measure.evaluate import Accuracy, Paired, compare, measure_accuracy
from common.network.size import LayerDescription, describe_layers
from pruning.alone.linear import LinearSearch
from pruning.alone.scan import Scan, ScanResult
from pruning.masks import pruned_count

# Neighbours in the ranking whose difference McNemar's test cannot tell from chance.
TIE_P = 0.05


# --- each layer alone ----------------------------------------------------------------------------


def describe_scan(scan: Scan, scanned: ScanResult) -> dict:
    """Return the structure, and what pruning each layer alone costs."""
    layers = describe_layers(scan.model, scan.network)
    result = {
        "baseline": measure_accuracy(scanned.dense_correct).as_dict(),
        "structure": describe_structure(scan.model, layers),
        "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in layers],
        "sensitivity": describe_sensitivity(scanned, {x.name: x.weights for x in layers}),
        "ranking": [{"amount": amount, "layers": rank(scanned, amount)} for amount in scan.amounts],
    }
    if scanned.recheck is not None:
        result["bf16"] = asdict(scanned.recheck)
    return result


def describe_structure(model: nn.Module, layers: Sequence[LayerDescription]) -> dict:
    """Return totals by kind; ``parameters`` is their sum and the model's own count."""
    weights = {
        kind: sum(x.weights for x in layers if x.kind == kind) for kind in ("conv", "linear")
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = [model.get_submodule(layer.name) for layer in layers]
    biases = sum(module.bias.numel() for module in modules if module.bias is not None)
    return {
        "conv_weights": weights["conv"],
        "linear_weights": weights["linear"],
        "biases": biases,
        "batch_norm_parameters": total - biases - sum(weights.values()),
        "parameters": total,
        "macs": sum(layer.macs for layer in layers),
        "nonzeros": sum(layer.nonzeros for layer in layers),
    }


def describe_sensitivity(scanned: ScanResult, weights: dict[str, int]) -> list[dict]:
    """Return one entry for each layer and amount, compared with the dense network.

    Args:
        scanned: Result of the scan.
        weights: Number of weights of each layer, to check the sparsity against.
    """
    entries = []
    for (amount, layer), correct in scanned.correct.items():
        achieved = scanned.achieved[amount, layer]
        # Weights that were zero before only add to what pruning asked for.
        if achieved < pruned_count(weights[layer], amount) / weights[layer] - 1e-9:
            raise AssertionError(f"{layer}: sparsity {achieved} is below the amount {amount}")
        measured = Paired.of(scanned.dense_correct, correct).as_dict()
        entries.append({"layer": layer, "amount": amount, "achieved": achieved, **measured})
    return entries


def rank(scanned: ScanResult, amount: float) -> list[dict]:
    """Rank the layers by drop, largest first, each tested against the next one on the same images.

    ``p_against_next`` is McNemar's p-value; ``tied_with_next`` says that chance explains the
    difference.
    """
    correct = {layer: c for (a, layer), c in scanned.correct.items() if a == amount}
    order = sorted(correct, key=lambda layer: int(correct[layer].sum()))
    entries = [{"layer": layer, "p_against_next": None, "tied_with_next": False} for layer in order]
    for entry, layer, following in zip(entries, order, order[1:], strict=False):
        p = compare(correct[layer], correct[following]).mcnemar_p
        entry |= {"p_against_next": p, "tied_with_next": p > TIE_P}
    return entries


# --- the linear layers ---------------------------------------------------------------------------


def describe_linear(search: LinearSearch, seconds: float, confirmed: dict) -> dict:
    """Return the search over the linear layers.

    Args:
        search: Result of the search.
        seconds: Time that it took.
        confirmed: Result of :func:`pruning.files.saved.confirm` for its model.
    """
    total, images, counts = search.weights, search.images, search.counts.tolist()
    result = {
        "layers": list(search.layers),
        "tolerance": search.tolerance,
        "images": images,
        "dense": Accuracy(int(search.correct[0]), images).as_dict(),
        "max_amount": counts[search.found] / total,
        "pruned_weights": counts[search.found],
        "kept_weights": total - counts[search.found],
        "steps": [
            {
                "amount": counts[step.level] / total,
                "pruned_weights": counts[step.level],
                "accuracy": Accuracy(step.correct, images).as_dict(),
                "kept": step.kept,
            }
            for step in search.steps
        ],
        "curve": [
            [count / total, correct / images]
            for count, correct in zip(counts, search.correct.tolist(), strict=True)
        ],
        "exhaustive_max_amount": counts[search.largest] / total,
        "monotone": search.is_monotone,
        "explanation": search.explain(),
        "seconds": seconds,
        "confirmed": confirmed,
    }
    if search.splits is not None:
        result["splits"] = describe_splits(search)
    return result


def describe_splits(search: LinearSearch) -> dict:
    """Return the choices on random halves: medians, and the range of the middle 90 %."""

    def spread(values: np.ndarray) -> dict:
        low, median, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
        return {"median": median, "middle90": [low, high]}

    splits = search.splits
    return {
        "splits": len(splits.drops),
        "within_tolerance": splits.within,
        "amount": spread(search.counts[splits.levels] / search.weights),
        "drop": spread(splits.drops) | {"mean": float(splits.drops.mean())},
    }
