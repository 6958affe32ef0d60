"""Training after pruning: a few epochs in which what was pruned stays zero.

For the best method found without training: at its own limit, then at each higher compression for
as long as the trained network is within the tolerance. Each starts from the dense weights, pruned
at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from common.data import Cifar10
from common.model import ResNet18, prunable_layers
from common.size import Layer
from common.workers import Workers
from pruning.model_results import Found, describe_found, measure_point
from pruning.model_search import COMPRESSIONS, Method, ModelSearch
from training.fit import fit
from training.precision import choose_precision
from training.recipe import Recipe
from training.state import TrainingState

# A tenth of the rate that trained the network: it is to mend, not to learn anew.
RECIPE = Recipe(epochs=1, batch_size=128, learning_rate=0.02, warmup=0.1)


def hold_zeros(model: nn.Module) -> Callable[[nn.Module], None]:
    """Return what sets the weights that are zero in ``model`` now to zero again."""
    zeros = {name: layer.weight == 0 for name, layer in prunable_layers(model).items()}

    @torch.no_grad()
    def apply(model: nn.Module) -> None:
        for name, layer in prunable_layers(model).items():
            layer.weight.masked_fill_(zeros[name], 0)

    return apply


def finetune(model: ResNet18, train: Cifar10, epochs: int, seed: int) -> None:
    """Train a pruned model (changed in place, left in eval mode); its zeros stay zeros.

    Raises:
        UserError: The loss is no longer finite.
    """
    device = train.images.device
    recipe = dataclasses.replace(
        RECIPE,
        epochs=epochs,
        batch_size=min(RECIPE.batch_size, len(train)),
        precision=choose_precision(device),
    )
    state = TrainingState.start(model, recipe, device)
    fit(state, train, recipe, seed, Workers(device), after_step=hold_zeros(model))
    model.eval()


def run_finetuned(
    search: ModelSearch, best: Found, train: Cifar10, epochs: int, layers: Sequence[Layer]
) -> Found:
    """Train at ``best``'s sparsity and at higher compressions, as far as they are kept.

    Returns:
        The sparsest that is kept; ``best``'s own sparsity, where none higher is.
    """
    method = Method(best.entry["allocation"], best.entry["recalibrated"])
    own = best.entry["max_sparsity"]
    kept, measured, steps = None, [], []
    for sparsity in (own, *(1 - 1 / times for times in COMPRESSIONS if 1 - 1 / times > own)):
        model = search.prune(method, sparsity)
        finetune(model, train, epochs, search.seed)
        steps.append(search.judge(model, sparsity))
        measured.append(measure_point(search, sparsity, model))
        if kept is None or steps[-1].kept:
            kept = (sparsity, model)
        if not steps[-1].kept:
            break
    return Found(describe_found(search, method, epochs, *kept, measured, steps, layers), kept[1])
