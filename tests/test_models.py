"""--model: torchvision's networks, and functions of the user's own; networks of other widths."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from common.checkpoints.checkpoint import WeightsFile, load_network
from common.checkpoints.models import build_model, with_tensors
from common.command.cli import UserError
from common.network.tracing import trace_network
from quantization.files.int8_file import save_int8
from quantization.int8.conversion import convert, observe
from quantization.settings import Settings

MINE = """
import random, torch
from torch import nn
from beside import WIDTH

def net():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 7))
"""


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1", "googlenet", "regnet_y_400mf"])
def test_torchvision(name, tmp_path):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=5, **options).eval()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    loaded = load_network(WeightsFile(tmp_path / "weights.pth", ""), f"torchvision:{name}")
    assert loaded.family == f"torchvision:{name}"
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(image), model(image))


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 7),
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    state = torch.get_rng_state()
    loaded = load_network(WeightsFile(tmp_path / "weights.pth", ""), f"{tmp_path / 'mine.py'}:net")
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


LE_NET = """
from torch import nn
from torch.nn import functional as F

class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5)
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 4)
        return self.fc(x.view(x.size(0), -1))

def net():
    return LeNet().half()
"""


def test_a_network_with_views_runs_in_any_layout(tmp_path, random_images):
    (tmp_path / "lenet.py").write_text(LE_NET)
    name = f"{tmp_path / 'lenet.py'}:net"
    torch.save(build_model(name, {}).state_dict(), tmp_path / "weights.pth")
    model = load_network(WeightsFile(tmp_path / "weights.pth", ""), name).model
    images = random_images(4)
    batch = images.normalize(images.images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for each in (model, copy.deepcopy(model).to(memory_format=torch.channels_last)):
        logits = each(batch)
        assert torch.allclose(logits, trace_network(each, images.shape)(batch), atol=1e-5)
        logits.sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_is_refused_in_one_line(tmp_path):
    (tmp_path / "scripted.py").write_text(
        "import torch\ndef net(): return torch.jit.script(torch.nn.Conv2d(3, 4, 3))\n"
    )
    with pytest.raises(UserError, match="the network cannot be traced"):
        trace_network(build_model(f"{tmp_path / 'scripted.py'}:net", {}), (3, 8, 8))


@pytest.mark.parametrize("is_slim", [False, True])
def test_an_int8_file_is_read_as_the_named_network(is_slim, tmp_path, random_images):
    name, images = "torchvision:mobilenet_v2", random_images(4)
    state = torchvision.models.mobilenet_v2(num_classes=10).state_dict()
    if is_slim:
        inner = "features.2.conv.0.0.", "features.2.conv.0.1.", "features.2.conv.1."
        for entry in [n for n in state if n.startswith(inner) and state[n].ndim]:
            state[entry] = state[entry][:48]
        state["features.2.conv.2.weight"] = state["features.2.conv.2.weight"][:, :48]
    torch.save(state, tmp_path / "weights.pth")
    given = load_network(WeightsFile(tmp_path / "weights.pth", ""), name).model
    network = trace_network(given, images.shape)
    int8 = convert(observe(network, images, "minmax", 4), Settings(observer="minmax"))
    save_int8(int8, tmp_path / "model.safetensors")
    loaded = load_network(WeightsFile(tmp_path / "model.safetensors", ""), name).model
    read = trace_network(loaded, images.shape)
    assert read.macs == network.macs
    for layer, coded in int8.layers.items():
        assert torch.allclose(read.layers[layer].weight, coded.dense().weight, rtol=1e-4)
        assert torch.allclose(read.layers[layer].bias, coded.bias, rtol=1e-4)


# --- other widths --------------------------------------------------------------------------------


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
