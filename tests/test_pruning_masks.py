import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resnet18 import ResNet18, Widths
from torch import nn
from torch.nn.utils import prune

from pruning import masks
from pruning.masks import copy_without, l1_mask, l1_mask_series, pruned_count


def torch_mask(weight, amount):
    """Torch's own pruning, through its public interface."""
    layer = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        layer.weight.copy_(weight)
    prune.l1_unstructured(layer, "weight", amount)
    return layer.weight_mask.bool()


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 60), st.booleans())
def test_keeps_the_weights_that_torch_keeps(seed, count, with_ties):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    if with_ties:
        weight = (weight * 2).round()  # many equal magnitudes, many zeros
    if count == 0:
        assert l1_mask(weight, 0).all()
    else:
        assert torch.equal(l1_mask(weight, count), torch_mask(weight, count))


@pytest.mark.parametrize("most_sorted", [0, masks.MOST_SORTED])
def test_masks_of_several_counts(most_sorted, monkeypatch):
    monkeypatch.setattr(masks, "MOST_SORTED", most_sorted)
    weight = (torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 2).round()
    counts = [0, 7, 30, 59, 60]
    for count, kept in zip(counts, l1_mask_series(weight, counts), strict=True):
        assert torch.equal(kept, l1_mask(weight, count))
        assert int(kept.sum()) == 60 - count
        if 0 < count < 60:
            assert weight[kept].abs().min() >= weight[~kept].abs().max()


@pytest.mark.parametrize("amount", [0.5, 0.33, 0.9, 0.999])
def test_rounds_the_amount_as_torch_does(amount):
    weight = torch.randn(7, 11)
    expected = torch_mask(weight, amount)
    assert torch.equal(l1_mask(weight, pruned_count(77, amount)), expected)
    assert int((~expected).sum()) == pruned_count(77, amount)


def test_everything_or_nothing():
    weight = torch.randn(3, 4)
    assert not l1_mask(weight, 12).any()
    assert l1_mask(weight, 0).all()


def test_prunes_only_the_named_layer():
    tiny_model = ResNet18(Widths((4, 8, 8, 8)))
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    mask = l1_mask(tiny_model.linear.weight, 30)
    pruned = copy_without(tiny_model, {"linear": mask})
    assert all(torch.equal(t, before[name]) for name, t in tiny_model.state_dict().items())
    for name, tensor in pruned.state_dict().items():
        expected = before[name] * mask if name == "linear.weight" else before[name]
        assert torch.equal(tensor, expected), name
