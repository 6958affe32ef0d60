import torch

from common.model import prunable_layers
from common.size import describe_layers
from pruning import finetuning, model_results
from pruning.allocation import uniform_masks, weights_in_scope
from pruning.masks import prune_model
from pruning.model_search import ModelSearch


def test_zeros_stay_zeros_and_the_rest_learns(tiny_model, random_images):
    masks = uniform_masks(weights_in_scope(tiny_model, "conv"), 0.8)
    prune_model(tiny_model, masks)
    before = {n: layer.weight.detach().clone() for n, layer in prunable_layers(tiny_model).items()}
    finetuning.finetune(tiny_model, random_images(40), epochs=2, seed=0)
    assert not tiny_model.training
    for name, layer in prunable_layers(tiny_model).items():
        assert torch.equal(layer.weight == 0, before[name] == 0), name
        assert not torch.equal(layer.weight, before[name]), name


def test_row_tells_of_the_sparsest_model_that_was_kept(tiny_model, random_images):
    test, layers = random_images(40), describe_layers(tiny_model)
    search = ModelSearch.prepare(
        tiny_model, "all", test, torch.arange(40) % 10 < 2, 0.5, 0, fast=False
    )
    best = model_results.run_all(search, ["global"], layers)[0]
    found = finetuning.run_finetuned(search, best, random_images(20, seed=2), 1, layers)
    entry, own = found.entry, best.entry["max_sparsity"]
    assert entry["finetune_epochs"] == 1
    kept = [step["sparsity"] for step in entry["steps"] if step["kept"]]
    assert entry["max_sparsity"] == max(kept, default=own)
    weights = [layer.weight for layer in prunable_layers(found.model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    assert zeros == round(entry["max_sparsity"] * total)
    correct = search.find_correct(search.held_out, found.model)
    assert int(correct.sum()) == entry["accuracy"]["correct"]
