"""What the search over many layers found, as results.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from common.measure.evaluate import measure_accuracy
from common.measure.latency import Timing
from common.network.resnet import ResNet18, prunable_layers
from common.network.size import Layer, describe_layers
from pruning.channels.speed import Measured
from pruning.files.saved import Confirmation, Sizes
from pruning.report.results import describe_timings
from pruning.together.found import CURVE_IMAGES, Found
from pruning.together.search import ModelSearch


def describe_search(search: ModelSearch, found: Sequence[Found]) -> list[dict]:
    """Return a row for each method."""
    layers = describe_layers(search.model)
    return [describe_found(search, one, layers) for one in found]


def describe_found(search: ModelSearch, found: Found, layers: Sequence[Layer]) -> dict:
    """Return a method's row; all of its curve, dense at its start, is on the same images."""
    first = search.held_out.first(CURVE_IMAGES).dense_correct
    curve = {(p.sparsity, p.accuracy.value) for p in (*found.curve, found.on_curve)}
    curve.add((0.0, measure_accuracy(first).value))
    comparison = found.measured.comparison
    return {
        "scope": search.scope,
        **describe_method(found),
        "max_sparsity": found.sparsity,
        "chosen_on_images": len(search.chosen.dense_correct),
        "accuracy": found.measured.accuracy.as_dict(),
        "comparison": comparison.as_dict(),
        "within_tolerance": comparison.drop <= search.tolerance + 1e-12,
        "dense": measure_accuracy(search.held_out.dense_correct).as_dict(),
        "curve": [list(pair) for pair in sorted(curve)],
        "points": [point.as_dict() for point in found.curve],
        "steps": [asdict(step) for step in found.steps],
        **describe_density(found.model, layers),
    }


def describe_method(found: Found) -> dict:
    """Return what was searched with."""
    return asdict(found.method) | {"finetune_epochs": found.finetune_epochs}


def describe_density(model: ResNet18, layers: Sequence[Layer]) -> dict:
    """Return the share of each dense layer that is gone, and of the multiply-adds that is left.

    Args:
        model: Pruned: weights are zero, or whole channels not there.
        layers: Of the dense network.
    """
    modules = prunable_layers(model)
    kept = {
        layer.name: int(modules[layer.name].weight.count_nonzero()) / layer.weights
        for layer in layers
    }
    macs = sum(layer.macs for layer in layers)
    return {
        "layers": [{"layer": name, "sparsity": 1 - density} for name, density in kept.items()],
        "macs_kept": sum(layer.macs * kept[layer.name] for layer in layers) / macs,
    }


def describe_slim(model: ResNet18, models: Sequence[Measured]) -> dict:
    """Return the slim network's widths, and how fast it is beside the dense one."""
    found = {one.name: one.timings for one in models}
    pairs = zip(found["dense int8"], found["slim int8"], strict=True)
    return {
        "widths": asdict(model.widths),
        "models": [one.as_dict() for one in models],
        "speedup": [
            {"batch_size": dense.batch_size, "over_dense": dense.median_ms / slim.median_ms}
            for dense, slim in pairs
        ],
    }


def describe_saved(
    search: ModelSearch,
    best: Found,
    confirmed: Confirmation,
    sizes: Sizes,
    timings: tuple[Timing, Timing],
) -> dict:
    """Return the sparsest network found, as it was written and read back."""
    return {
        "scope": search.scope,
        **describe_method(best),
        "macs_kept": describe_density(best.model, describe_layers(search.model))["macs_kept"],
        "sparsity": best.sparsity,
        **confirmed.as_dict(),
        **asdict(sizes),
        "latency": describe_timings(timings, "pruned"),
    }
