"""Bytes, parameters and multiply-accumulates, counted again by hand."""

from __future__ import annotations

import torch
from resnet18 import ResNet18

from common.checkpoints.checkpoint import save_checkpoint
from common.network.size import describe_layers, saved_size_bytes
from common.network.tracing import trace_network


def describe(model, shape=(3, 32, 32)):
    return describe_layers(model, trace_network(model, shape))


def test_layers_of_the_full_network():
    layers = {layer["name"]: layer for layer in describe(ResNet18().eval())}
    assert len(layers) == 21
    stem = layers["conv1"]
    assert (stem["kind"], stem["shape"]) == ("conv", [64, 3, 3, 3])
    assert (stem["weights"], stem["macs"]) == (1728, 1728 * 32 * 32)
    assert layers["layer2.0.conv1"]["macs"] == 128 * 64 * 9 * 16 * 16
    assert layers["layer2.0.shortcut.0"]["macs"] == 128 * 64 * 16 * 16
    assert layers["layer4.1.conv2"]["macs"] == 512 * 512 * 9 * 4 * 4
    linear = layers["linear"]
    assert (linear["kind"], linear["shape"], linear["macs"]) == ("linear", [10, 512], 5120)
    assert sum(layer["macs"] for layer in layers.values()) == 555_422_720


def test_nonzeros_are_counted(tiny_model):
    tiny_model.layer1[0].conv1.weight.data[:, 0] = 0
    layer = next(x for x in describe(tiny_model) if x["name"] == "layer1.0.conv1")
    assert (layer["weights"], layer["nonzeros"]) == (4 * 4 * 9, 4 * 3 * 9)


def test_describe_layers_leaves_the_model_alone(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    describe(tiny_model)
    assert not any(module._forward_hooks for module in tiny_model.modules())
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_saved_size_is_that_of_the_file(tmp_path):
    state = {"weight": torch.zeros(1000), "half": torch.zeros(1000, dtype=torch.float16)}
    save_checkpoint(state, tmp_path / "model.pth")
    assert saved_size_bytes(state) == (tmp_path / "model.pth").stat().st_size
    assert 6000 < saved_size_bytes(state) < 8000
