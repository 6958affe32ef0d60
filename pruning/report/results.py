"""The parts of results.json about each layer alone, and about many layers together."""

from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from common.measure.evaluate import Paired, compare, measure_accuracy
from common.network.size import describe_layers
from pruning.alone.scan import Scan, ScanResult
from pruning.masks import zeros_at
from pruning.together.found import CURVE_IMAGES, Found
from pruning.together.search import ModelSearch

# Neighbours in the ranking whose difference McNemar's test cannot tell from chance.
TIE_P = 0.05


def describe_scan(scan: Scan, scanned: ScanResult) -> dict:
    """Return the structure, and what pruning each layer alone costs."""
    layers = describe_layers(scan.model, scan.network)
    result = {
        "baseline": measure_accuracy(scanned.dense_correct).as_dict(),
        "structure": describe_structure(scan.model, layers),
        "layers": layers,
        "sensitivity": [
            {"layer": layer, "amount": amount, "achieved": zeros_at(scan.weights[layer], amount)}
            | Paired.of(scanned.dense_correct, correct).as_dict()
            for (amount, layer), correct in scanned.correct.items()
        ],
        "ranking": [{"amount": amount, "layers": rank(scanned, amount)} for amount in scan.amounts],
    }
    if scanned.recheck is not None:
        result["bf16"] = asdict(scanned.recheck)
    return result


def describe_structure(model: nn.Module, layers: Sequence[dict]) -> dict:
    """Return totals by kind; ``parameters`` is the sum of the first four."""
    conv, linear = (
        sum(layer["weights"] for layer in layers if layer["kind"] == kind)
        for kind in ("conv", "linear")
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = [model.get_submodule(layer["name"]) for layer in layers]
    biases = sum(module.bias.numel() for module in modules if module.bias is not None)
    return {
        "conv_weights": conv,
        "linear_weights": linear,
        "biases": biases,
        "batch_norm_parameters": total - biases - conv - linear,
        "parameters": total,
        "macs": sum(layer["macs"] for layer in layers),
        "nonzeros": sum(layer["nonzeros"] for layer in layers),
    }


def rank(scanned: ScanResult, amount: float) -> list[dict]:
    """Rank the layers by drop, largest first, each tested against the next one by McNemar."""
    correct = {layer: c for (a, layer), c in scanned.correct.items() if a == amount}
    order = sorted(correct, key=lambda layer: int(correct[layer].sum()))
    entries = [{"layer": layer, "p_against_next": None, "tied_with_next": False} for layer in order]
    for entry, layer, following in zip(entries, order, order[1:], strict=False):
        p = compare(correct[layer], correct[following]).mcnemar_p
        entry |= {"p_against_next": p, "tied_with_next": p > TIE_P}
    return entries


def describe_found(search: ModelSearch, found: Found) -> dict:
    """Return a method's row; the points of its curve, from dense on, share the same images."""
    dense_correct, macs = search.held_out.dense_correct, search.scan.network.macs
    measured = Paired.of(dense_correct, found.correct)
    curve = {(sparsity, point.accuracy.value) for sparsity, point in found.points.items()}
    for sparsity, correct in ((0.0, dense_correct), (found.sparsity, found.correct)):
        curve.add((sparsity, measure_accuracy(correct[:CURVE_IMAGES]).value))
    kept = {  # shares of the weights that are not zero
        name: int(found.model.get_submodule(name).weight.count_nonzero()) / weight.numel()
        for name, weight in search.scan.weights.items()
    }
    return {
        "scope": search.scope,
        **asdict(found.method),
        "finetune_epochs": found.finetune_epochs,
        "max_sparsity": found.sparsity,
        "chosen_on_images": len(search.budget.choosing),
        **measured.as_dict(),
        "within_tolerance": measured.comparison.drop <= search.budget.max_drop + 1e-12,
        "dense": measure_accuracy(dense_correct).as_dict(),
        "curve": [list(pair) for pair in sorted(curve)],
        "points": [{"sparsity": s} | point.as_dict() for s, point in found.points.items()],
        "steps": [
            {
                "sparsity": 1 - 1 / trial.strength,
                "images": trial.verdict.accuracy.total,
                "correct": trial.verdict.accuracy.correct,
                "kept": trial.verdict.passes,
            }
            for trial in found.trials
        ],
        "layers": [{"layer": name, "sparsity": 1 - density} for name, density in kept.items()],
        "macs_kept": sum(macs[name] * kept[name] for name in kept) / sum(macs.values()),
    }
