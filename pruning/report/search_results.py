"""The part of results.json about the search over many layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from common.measure.evaluate import measure_accuracy
from common.network.size import LayerDescription, describe_layers
from common.network.tracing import trace_network
from pruning.together.found import CURVE_IMAGES, Found
from pruning.together.search import ModelSearch


def describe_found(search: ModelSearch, found: Found) -> dict:
    """Return a method's row; the points of its curve, from dense on, share the same images."""
    network = trace_network(search.model, search.held_out.images.shape)
    first = search.held_out.first(CURVE_IMAGES).dense_correct
    curve = {(0.0, measure_accuracy(first).value), (found.sparsity, found.on_curve.accuracy.value)}
    curve |= {(sparsity, point.accuracy.value) for sparsity, point in found.points.items()}
    return {
        "scope": search.scope,
        **asdict(found.method),
        "finetune_epochs": found.finetune_epochs,
        "max_sparsity": found.sparsity,
        "chosen_on_images": len(search.budget.choosing),
        **found.measured.as_dict(),
        "within_tolerance": found.measured.comparison.drop <= search.budget.max_drop + 1e-12,
        "dense": measure_accuracy(search.held_out.dense_correct).as_dict(),
        "curve": [list(pair) for pair in sorted(curve)],
        "points": [{"sparsity": s} | point.as_dict() for s, point in found.points.items()],
        "steps": [
            {
                "sparsity": 1 - 1 / trial.strength,
                "images": trial.verdict.shown,
                "correct": trial.verdict.accuracy.correct,
                "kept": trial.verdict.passes,
            }
            for trial in found.trials
        ],
        **describe_density(found.model, describe_layers(search.model, network)),
    }


def describe_density(model: nn.Module, layers: Sequence[LayerDescription]) -> dict:
    """Return the share of each layer's weights that is gone, and of multiply-adds that is left.

    Args:
        model: Pruned network: weights are zero, or whole channels are missing.
        layers: Layers of the dense network.
    """
    kept = {
        layer.name: int(model.get_submodule(layer.name).weight.count_nonzero()) / layer.weights
        for layer in layers
    }
    macs = sum(layer.macs for layer in layers)
    return {
        "layers": [{"layer": name, "sparsity": 1 - density} for name, density in kept.items()],
        "macs_kept": sum(layer.macs * kept[layer.name] for layer in layers) / macs,
    }


def describe_slim(dense: nn.Module, slim: nn.Module, models: Sequence[dict]) -> dict:
    """Return which layers are narrower in the slim network, and how fast it is.

    Args:
        dense: The dense network.
        slim: The same without some channels.
        models: Entries of both networks in FP32 and INT8.
    """
    before, after = (
        {name: len(weight) for name, weight in model.state_dict().items() if weight.ndim > 1}
        for model in (dense, slim)
    )
    latency = {one["name"]: one["latency"] for one in models}
    pairs = zip(latency["dense int8"], latency["slim int8"], strict=True)
    return {
        "widths": [
            {"layer": name.removesuffix(".weight"), "dense": width, "slim": after[name]}
            for name, width in before.items()
            if after[name] < width
        ],
        "models": list(models),
        "speedup": [
            {
                "batch_size": one["batch_size"],
                "over_dense": one["median_ms"] / other["median_ms"],
                "noisy": one["noisy"] or other["noisy"],
            }
            for one, other in pairs
        ],
    }
