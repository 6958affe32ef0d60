"""What was found, as results.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from common.measure.evaluate import Accuracy, Paired, compare, measure_accuracy
from common.network.resnet import ResNet18, prunable_layers
from common.network.size import Layer, describe_layers
from pruning.alone.linear import LinearSearch, Splits
from pruning.alone.scan import ScanResult
from pruning.masks import pruned_count

# Neighbours in the ranking whose difference McNemar's test cannot tell from chance.
TIE_P = 0.05


# --- each layer alone ----------------------------------------------------------------------------


def describe_scan(scanned: ScanResult, model: ResNet18, amounts: Sequence[float]) -> dict:
    """Return what the structure is and what each layer alone costs."""
    layers = describe_layers(model)
    result = {
        "baseline": measure_accuracy(scanned.dense_correct).as_dict(),
        "structure": describe_structure(model, layers),
        "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in layers],
        "sensitivity": describe_sensitivity(scanned, {x.name: x.weights for x in layers}),
        "ranking": [{"amount": amount, "layers": rank(scanned, amount)} for amount in amounts],
    }
    if scanned.recomputation is not None:
        result["bf16"] = asdict(scanned.recomputation)
    return result


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


def describe_sensitivity(scanned: ScanResult, weights: dict[str, int]) -> list[dict]:
    """Return one entry a layer and amount, against dense.

    Args:
        scanned: What the scan found.
        weights: For each layer its number of them, to check the sparsity against.
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

    ``p_against_next`` is McNemar's; ``tied_with_next`` says that chance explains the difference.
    """
    correct = {layer: c for (a, layer), c in scanned.correct.items() if a == amount}
    order = sorted(correct, key=lambda layer: int(correct[layer].sum()))
    entries = [{"layer": layer, "p_against_next": None, "tied_with_next": False} for layer in order]
    for entry, layer, following in zip(entries, order, order[1:], strict=False):
        p = compare(correct[layer], correct[following]).mcnemar_p
        entry |= {"p_against_next": p, "tied_with_next": p > TIE_P}
    return entries


# --- the linear layer ----------------------------------------------------------------------------


def describe_linear(search: LinearSearch, seconds: float, confirmed: dict) -> dict:
    """Return the search over the linear layer, which took so many seconds.

    ``confirmed`` is what :func:`pruning.files.saved.confirm` says of its model.
    """
    total, images = search.weights, search.images
    result = {
        "tolerance": search.tolerance,
        "images": images,
        "dense": Accuracy(int(search.correct[0]), images).as_dict(),
        "max_amount": search.found / total,
        "kept_weights": total - search.found,
        "steps": [
            {
                "amount": step.count / total,
                "pruned_weights": step.count,
                "accuracy": Accuracy(step.correct, images).as_dict(),
                "kept": step.kept,
            }
            for step in search.steps
        ],
        "curve": [[count / total, int(n) / images] for count, n in enumerate(search.correct)],
        "exhaustive_max_amount": search.largest / total,
        "monotone": search.is_monotone,
        "explanation": search.explain(),
        "seconds": seconds,
        "confirmed": confirmed,
    }
    if search.splits is not None:
        result["splits"] = describe_splits(search.splits, total)
    return result


def describe_splits(splits: Splits, weights: int) -> dict:
    """Return the choices on random halves: medians, and what nine in ten lie between."""

    def spread(values: np.ndarray) -> dict:
        low, median, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
        return {"median": median, "middle90": [low, high]}

    return {
        "splits": len(splits.drops),
        "within_tolerance": splits.within,
        "amount": spread(splits.counts / weights),
        "drop": spread(splits.drops) | {"mean": float(splits.drops.mean())},
    }


def describe_savings(sizes: dict, model: ResNet18, latency: Sequence[dict]) -> dict:
    """Return the bytes, the linear layer's share of the weights, and what zeros do for speed."""
    weights = {name: layer.weight.numel() for name, layer in prunable_layers(model).items()}
    linear_share = weights["linear"] / sum(weights.values())
    return {**sizes, "linear_share": linear_share, "latency": latency}
