import pytest
import torch
from resnet18 import weight_modules

from common.measure.evaluate import Accuracy
from common.search.budget import Verdict
from pruning.alone.scan import Scan
from pruning.masks import copy_without, l1_masks
from pruning.together.allocation import SENSITIVITY
from pruning.together.found import finetune, search_finetuned, search_with
from pruning.together.search import Method, ModelSearch
from training.loop.distillation import Training


def test_zeros_stay_zeros_and_the_rest_learns(tiny_model, random_images):
    weights = {name: layer.weight.detach() for name, layer in weight_modules(tiny_model).items()}
    pruned = copy_without(tiny_model, l1_masks(weights, 0.8))
    before = {n: layer.weight.detach().clone() for n, layer in weight_modules(pruned).items()}
    finetune(pruned, tiny_model, Training(random_images(40), epochs=2), 0)
    assert not pruned.training
    for name, layer in weight_modules(pruned).items():
        assert torch.equal(layer.weight == 0, before[name] == 0), name
        assert not torch.equal(layer.weight, before[name]), name


@pytest.fixture
def search(tiny_model, random_images):
    scan = Scan(tiny_model, random_images(40), [], [], 4, False)
    return ModelSearch(scan, torch.arange(40) % 10 < 2, "all", 0.5, 0)


def test_the_sparsest_model_that_was_kept_is_found(search, random_images):
    best = search_with(search, Method(SENSITIVITY, False))
    found = search_finetuned(search, best, Training(random_images(20, seed=2), 1))
    assert found.finetune_epochs == 1
    passing = [trial.strength for trial in found.trials if trial.verdict.passes]
    assert found.sparsity == pytest.approx(1 - 1 / max(passing, default=1.0))
    weights = [layer.weight for layer in weight_modules(found.model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    # Each layer's curve ends on a whole weight, so a few less may go than asked for.
    asked = round(found.sparsity * sum(weight.numel() for weight in weights))
    assert asked - len(weights) < zeros <= asked
    correct = search.classifier(found.model)(search.held_out.images)
    assert torch.equal(correct, found.correct)


def test_a_rejected_model_is_not_the_answer(search, random_images, monkeypatch):
    """Rejected at the sparsity of the best without training, it was still reported there."""
    best = search_with(search, Method(SENSITIVITY, False))
    monkeypatch.setattr(search, "judge", lambda model: Verdict(Accuracy(0, 20), None, -1.0))
    found = search_finetuned(search, best, Training(random_images(20, seed=2), 1))
    assert (found.sparsity, len(found.trials)) == (0.0, 1)
    assert found.model is search.model
    assert list(found.points) == [best.sparsity]
