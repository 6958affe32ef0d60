"""What the search over many layers found: its rows in results.json, and the model that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import checkpoint, cli
from common.evaluate import compare, measure_accuracy, predict
from common.model import ResNet18, prunable_layers
from common.report import points
from common.size import Layer
from pruning import savings
from pruning.allocation import RANDOM
from pruning.model_search import COMPRESSIONS, Method, ModelSearch, Step

# The curve's points are for orientation, and losses there are large or none.
CURVE_IMAGES = 2000


@dataclass(frozen=True)
class Found:
    """A row of results.json's ``model_search``, and the pruned network that it tells of."""

    entry: dict
    model: ResNet18


def run_all(
    search: ModelSearch, allocations: Sequence[str], layers: Sequence[Layer]
) -> list[Found]:
    """Search with every allocation, again with batch norms re-estimated; random pruning last."""
    methods = [Method(allocation, False) for allocation in allocations]
    if search.training is not None:
        methods += [Method(allocation, True) for allocation in allocations]
    found = []
    for method in (*methods, Method(RANDOM, False)):
        found.append(run_method(search, method, layers))
        entry = found[-1].entry
        cli.log.info(
            "%s%s: %.1f %% of the weights can go, %s points on held-out images",
            method.allocation,
            ", batch norms re-estimated" if method.recalibrated else "",
            100 * entry["max_sparsity"],
            points(0.0 - entry["comparison"]["drop"]),
        )
    return found


def run_method(search: ModelSearch, method: Method, layers: Sequence[Layer]) -> Found:
    """Search with one method and measure it on the held-out half."""
    sparsity, steps = search.find_largest(method)
    pruned = search.prune(method, sparsity)
    curve = [
        measure_point(search, 1 - 1 / times, search.prune(method, 1 - 1 / times), CURVE_IMAGES)
        for times in COMPRESSIONS
    ]
    return Found(describe_found(search, method, 0, sparsity, pruned, curve, steps, layers), pruned)


def describe_found(
    search: ModelSearch,
    method: Method,
    finetune_epochs: int,
    sparsity: float,
    model: ResNet18,
    measured: Sequence[dict],
    steps: Sequence[Step],
    layers: Sequence[Layer],
) -> dict:
    """Return a row of results.json's ``model_search``.

    Args:
        search: What chose.
        method: What was searched with.
        finetune_epochs: Epochs of training after pruning.
        sparsity: The largest within the tolerance.
        model: As pruned by that.
        measured: What :func:`measure_point` found at other sparsities.
        steps: Of the search.
        layers: Of the network.
    """
    point = measure_point(search, sparsity, model)
    dense = measure_accuracy(search.held_out.dense_correct)
    curve = {(p["sparsity"], p["accuracy"]["value"]) for p in (*measured, point)}
    return {
        "scope": search.scope,
        "allocation": method.allocation,
        "recalibrated": method.recalibrated,
        "finetune_epochs": finetune_epochs,
        "max_sparsity": sparsity,
        "chosen_on_images": len(search.chosen.dense_correct),
        "accuracy": point["accuracy"],
        "comparison": point["comparison"],
        "within_tolerance": point["comparison"]["drop"] <= search.tolerance + 1e-12,
        "dense": dense.as_dict(),
        "curve": [list(pair) for pair in sorted({(0.0, dense.value)} | curve)],
        "points": list(measured),
        "steps": [asdict(step) for step in steps],
        **describe_density(model, layers),
    }


def measure_point(
    search: ModelSearch, sparsity: float, model: ResNet18, most: int | None = None
) -> dict:
    """Measure a pruned model on ``most`` held-out images, against dense on the same ones."""
    half = search.held_out.first(most)
    correct = search.find_correct(half, model)
    return {
        "sparsity": sparsity,
        "accuracy": measure_accuracy(correct).as_dict(),
        "comparison": compare(half.dense_correct, correct).as_dict(),
    }


def describe_density(model: ResNet18, layers: Sequence[Layer]) -> dict:
    """Return a pruned model's zeros by layer, and the multiply-adds that are not with a zero."""
    kept = {
        name: int(module.weight.count_nonzero()) / module.weight.numel()
        for name, module in prunable_layers(model).items()
    }
    macs = sum(layer.macs for layer in layers)
    return {
        "layers": [{"layer": name, "sparsity": 1 - density} for name, density in kept.items()],
        "macs_kept": sum(layer.macs * kept[layer.name] for layer in layers) / macs,
    }


def best_of(found: Sequence[Found]) -> Found:
    """Return the sparsest model found; random pruning is no candidate."""
    return max(
        (one for one in found if one.entry["allocation"] != RANDOM),
        key=lambda one: (one.entry["max_sparsity"], one.entry["accuracy"]["value"]),
    )


def save_best(search: ModelSearch, found: Sequence[Found], plain: Path, packed: Path) -> dict:
    """Write the sparsest model found, reload it and measure it again on the held-out half.

    Returns:
        results.json's ``model_saved``.

    Raises:
        UserError: More than 1 prediction in 1,000 differs from the search's.
    """
    best, images = best_of(found), search.held_out.images
    sizes = savings.save_artifacts(search.model, best.model, plain, packed)
    reloaded = checkpoint.load_model(plain).to(images.images.device)
    correct = predict(reloaded, images, description="confirm") == images.labels.cpu()
    unlike = int((correct != search.find_correct(search.held_out, best.model)).sum())
    savings.check_flips(unlike, len(correct))
    names = ("scope", "allocation", "recalibrated", "finetune_epochs", "macs_kept")
    return {
        **{name: best.entry[name] for name in names},
        "sparsity": best.entry["max_sparsity"],
        "accuracy": measure_accuracy(correct).as_dict(),
        "comparison": compare(search.held_out.dense_correct, correct).as_dict(),
        "images_unlike_search": unlike,
        **sizes,
        "latency": savings.time_zeros(search.model, reloaded, "pruned", images),
    }
