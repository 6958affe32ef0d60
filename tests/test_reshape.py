import copy

import pytest
import torch
import torchvision
from torch import nn

from common.network.reshape import with_tensors


def test_module_gets_the_tensors_and_their_widths():
    """A narrower torchvision network, made by its own width multiplier, is the oracle."""
    torch.manual_seed(0)
    wide, narrow = (
        torchvision.models.mobilenet_v2(num_classes=5, width_mult=width).eval()
        for width in (1.0, 0.5)
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = narrow(images)
        shaped = with_tensors(wide, narrow.state_dict())
        torch.testing.assert_close(shaped(images), expected)
    assert wide.features[0][0].out_channels == 32
    depthwise = shaped.features[2].conv[1][0]
    assert depthwise.groups == depthwise.in_channels == len(depthwise.weight)


def test_layer_may_have_gained_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).eval()
    state = model.state_dict() | {"0.bias": torch.arange(4.0)}
    assert torch.equal(with_tensors(model, state)[0].bias, torch.arange(4.0))


def test_buffers_that_no_state_dict_holds_and_second_names_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    model.register_buffer("grid", torch.arange(3.0), persistent=False)
    model.alias = model[0]
    other = {name: torch.randn(2, *t.shape[1:]) for name, t in model.state_dict().items()}
    shaped = with_tensors(model, other)
    assert shaped.alias is shaped[0]
    assert torch.equal(shaped[0].weight, other["0.weight"])
    assert torch.equal(shaped.grid, model.grid)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("1.running_var"), "1.running_var is missing"),
        (lambda state: state.update(other=torch.ones(1)), "other is unexpected"),
        (lambda state: state.update({"0.weight": torch.ones(4, 3)}), "number of dimensions"),
    ],
)
def test_tensors_of_another_module_are_refused(change, words):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    state = copy.deepcopy(dict(model.state_dict()))
    change(state)
    with pytest.raises(ValueError, match=words):
        with_tensors(model, state)
