"""Layouts of real training checkpoints, rebuilt small: each gives the plain network's weights."""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from resnet18 import weight_modules
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from common.checkpoints.checkpoint import WeightsFile, find_weights, load_network
from common.checkpoints.models import build_model
from common.checkpoints.resnet import BlockShape, ResNet, ResNetShape
from common.command import cli
from common.command.cli import UserError
from pruning.alone.scan import choose_layers

State = dict[str, torch.Tensor]


def load(content: object, tmp_path: Path, **options: object):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return load_network(WeightsFile(path, "a test", options.pop("key", None)), **options)


def same_weights(model: nn.Module, state: State) -> bool:
    """Whether a model has the weights, in their order, whatever its names."""
    own = list(model.state_dict().values())
    return len(own) == len(state) and all(map(torch.equal, own, state.values()))


def as_weiaicunzai(state: State) -> State:
    def rename(name: str) -> str:
        name = re.sub(r"^bn1\.", "conv1.1.", re.sub(r"^conv1\.", "conv1.0.", name))
        name = re.sub(r"^layer(\d)\.", lambda m: f"conv{int(m[1]) + 1}_x.", name)
        for old, new in (("conv1", "0"), ("bn1", "1"), ("conv2", "3"), ("bn2", "4")):
            name = re.sub(rf"(_x\.\d+)\.{old}\.", rf"\1.residual_function.{new}.", name)
        return name.replace("linear.", "fc.")

    return {rename(name): tensor for name, tensor in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


MEANS = {"mean": "mu", "std": "sigma"}
STATISTICS = {"mu": torch.tensor([0.5, 0.4, 0.3]), "sigma": torch.tensor([0.2, 0.3, 0.25])}


def twice_with_normalisers(state: State) -> dict:
    both = {}
    for model, layer in (("model", "normalizer"), ("attacker.model", "attacker.normalize")):
        both |= prefixed(f"module.{model}.", state)
        both[f"module.{layer}.new_mean"] = STATISTICS["mu"].view(3, 1, 1)
        both[f"module.{layer}.new_std"] = STATISTICS["sigma"].view(3, 1, 1)
    return {"model": both, "epoch": 149}


class AttributeDict(dict):
    """What Lightning keeps its hyper-parameters in."""


OBJECTS = {
    "numpy scalar": np.float64(92.65),
    "numpy array": np.arange(4.0),
    "namespace": argparse.Namespace(lr=0.1),
    "path": pathlib.PurePosixPath("/x"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "attribute dictionary": AttributeDict(lr=0.1),
    "deque": collections.deque([1, 2]),
}
LAYOUTS = {
    "ema": (lambda s: {"ema": s, "epoch": 1}, "its entry ema is taken"),
    "two deep": (lambda s: {"model": {"name": "r", "weights": s}}, "entry model.weights is taken"),
    "lightning": (
        lambda s: {"state_dict": prefixed("model.", s), "loops": {}, "optimizer_states": []},
        "the prefix model. of all names",
    ),
    "sequential": (lambda s: prefixed("1.", s), "the prefix 1. of all names"),
    "two prefixes": (lambda s: prefixed("module.model.", s), "the prefix module.model. of all"),
    "FSDP": (lambda s: prefixed("_fsdp_wrapped_module.", s), "_fsdp_wrapped_module taken out"),
    "SWA": (
        lambda s: {"n_averaged": torch.tensor(75), **prefixed("module.", s)},
        "n_averaged passed over",
    ),
    "weights of a loss": (
        lambda s: {"state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(10)}},
        "criterion.weight passed over: all layers' names begin with model.",
    ),
    "a batch norm's counter": (
        lambda s: s | {"linear.num_batches_tracked": torch.tensor(1)},
        "linear.num_batches_tracked passed over",
    ),
    "thop": (
        lambda s: s | {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)},
        "total_ops, total_params passed over",
    ),
    "mu and sigma": (lambda s: STATISTICS | s, ""),
    "pixel mean": (lambda s: {f"pixel_{n}": 255 * STATISTICS[m] for n, m in MEANS.items()} | s, ""),
    "twice": (twice_with_normalisers, "the same network is there 2 times"),
    "weiaicunzai": (as_weiaicunzai, "its names are mapped"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tiny_state, tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    change, note = LAYOUTS[layout]
    loaded = load(change(tiny_state), tmp_path)
    assert same_weights(loaded.model, tiny_state)
    assert note in capsys.readouterr().err
    has_statistics = layout in ("mu and sigma", "pixel mean", "twice")
    assert loaded.statistics == (((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)) if has_statistics else None)


def test_the_weights_of_a_loss_are_left_out_where_the_names_of_the_network_are_known(tmp_path):
    """All layers' names begin with ``net.`` in the user's own class."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                        nn.Linear(4, 10))\n"
        "    return nn.Sequential(net)\n"
    )
    model = f"{tmp_path / 'own.py'}:build"
    state = build_model(model, {}).state_dict()
    content = {"state_dict": prefixed("model.", state) | {"loss.weight": torch.ones(10)}}
    assert same_weights(load(content, tmp_path, model=model).model, state)


def test_layers_are_chosen_by_the_checkpoints_own_names(tiny_state, tmp_path):
    content = prefixed("model.", as_weiaicunzai(tiny_state))
    own_names = load(content, tmp_path).own_names
    assert {f"{name}.weight" for name in own_names.values()} <= {*content}
    names = ["conv1", "layer4.0.conv1", "layer4.0.shortcut.0", "linear"]
    for patterns, expected in (
        (["model.conv5_x.0.residual_function.0"], ["layer4.0.conv1"]),
        (["*.fc", "model.conv1.0"], ["conv1", "linear"]),
        (["layer4.*"], ["layer4.0.conv1", "layer4.0.shortcut.0"]),
        (None, names),
    ):
        assert choose_layers(names, patterns, own_names) == expected


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_alphabetical_order_puts_no_block_before_another(suffix, tmp_path):
    stage = (BlockShape((8, 8), False),) * 12
    state = ResNet(ResNetShape(3, 8, (stage,), 10), False).state_dict()
    renamed = dict(sorted(as_weiaicunzai(state).items()))
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(renamed, path)
    assert same_weights(load_network(WeightsFile(path, "")).model, state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights(kind, legacy, tiny_state, tmp_path):
    path = tmp_path / "weights.pth"
    content = {"state_dict": tiny_state, "extra": [OBJECTS[kind]], "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert same_weights(load_network(WeightsFile(path, "")).model, tiny_state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("extra", [nn.CrossEntropyLoss(), argparse.Namespace(lr=0.1), None])
def test_a_newer_pickle_and_modules_beside_the_weights(extra, legacy, tiny_state, tmp_path):
    path = tmp_path / "weights.pth"
    content, is_zip = {"state_dict": tiny_state, "extra": extra}, not legacy
    for protocol in (2, 4):
        torch.save(
            content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip
        )  # fmt: skip
        assert same_weights(load_network(WeightsFile(path, "")).model, tiny_state)


def test_a_checkpoint_that_is_an_attribute_dictionary(tiny_state, tmp_path):
    content = AttributeDict(state_dict=tiny_state, epoch=3)
    assert same_weights(load(content, tmp_path).model, tiny_state)


def test_raw_and_averaged_weights(tiny_state, tmp_path, capsys):
    cli.set_up_messages(quiet=True)
    raw = {name: tensor + 1 for name, tensor in tiny_state.items()}
    content = {"state_dict": raw, "state_dict_ema": tiny_state}
    assert same_weights(load(content, tmp_path).model, tiny_state)
    path = tmp_path / "weights.pth"
    assert capsys.readouterr().err == (
        f"warning: {path}: holds averaged weights beside others: state_dict_ema is taken; "
        f"--weights {path}:state_dict takes the other\n"
    )
    chosen = find_weights(Path(f"{path}:state_dict"), tmp_path)
    assert (chosen.path, chosen.key) == (path, "state_dict")
    assert same_weights(load_network(chosen).model, raw)
    with pytest.raises(UserError, match="under the key no; it has state_dict, state_dict_ema"):
        load_network(find_weights(Path(f"{path}:no"), tmp_path))


def test_raw_and_averaged_weights_of_one_module(tiny_state, tmp_path, capsys):
    """The key that the warning names works."""
    cli.set_up_messages(quiet=True)
    averaged = {name: tensor + 1 for name, tensor in tiny_state.items()}
    both = prefixed("model.", tiny_state) | prefixed("ema_model.module.", averaged)
    content = {"state_dict": both, "epoch": 3}
    assert same_weights(load(content, tmp_path).model, averaged)
    assert f"--weights {tmp_path / 'weights.pth'}:model takes the other" in capsys.readouterr().err
    assert same_weights(load(content, tmp_path, key="model").model, tiny_state)
    counted = {"initted": torch.tensor(True), "step": torch.tensor(9)} | both  # by ema_pytorch
    assert same_weights(load(counted, tmp_path).model, averaged)


def torch_ema(state: State) -> dict:
    """What torch-ema's ``ExponentialMovingAverage.state_dict()`` returns."""
    parameters = [tensor for name, tensor in state.items() if "running" not in name]
    return {"decay": 0.99, "num_updates": 9, "shadow_params": parameters, "collected_params": None}


def test_averaged_weights_without_names_are_told(tiny_state, tmp_path, capsys):
    cli.set_up_messages(quiet=True)
    history = [torch.zeros(10, 10)] * 3  # no weights
    content = {"model": tiny_state, "ema": torch_ema(tiny_state), "confusion": history}
    assert same_weights(load(content, tmp_path).model, tiny_state)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'weights.pth'}: ema.shadow_params holds weights without names and "
        "is passed over; if you want those, save the network's state_dict(), inside "
        "average_parameters() with torch-ema\n"
    )
    load(content, tmp_path, key="model")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="shadow_params holds weights without names; save"):
        load(torch_ema(tiny_state), tmp_path)


def test_pruning_masks_are_applied(tiny_model, tmp_path):
    layers = weight_modules(tiny_model).values()
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    masked = load(tiny_model.state_dict(), tmp_path).model
    for layer in layers:
        prune.remove(layer, "weight")
    removed = load(tiny_model.state_dict(), tmp_path).model
    for name, tensor in removed.state_dict().items():
        assert torch.equal(masked.state_dict()[name], tensor)
    assert (masked.linear.weight == 0).sum() == masked.linear.weight.numel() // 2


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_torch_file_named_safetensors(legacy, tiny_state, tmp_path):
    path = tmp_path / "weights.safetensors"
    for extra in ({}, {"args": argparse.Namespace(lr=0.1)}):
        content = {"state_dict": tiny_state, **extra}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert same_weights(load_network(WeightsFile(path, "")).model, tiny_state)


def test_safetensors_under_another_suffix(tiny_state, tmp_path):
    save_file(dict(tiny_state), tmp_path / "model.bin")
    loaded = load_network(WeightsFile(tmp_path / "model.bin", ""))
    assert all(
        torch.equal(tensor, tiny_state[name]) for name, tensor in loaded.model.state_dict().items()
    )


def test_a_pre_activation_network_is_not_taken_for_another(tmp_path):
    """It has the shapes and the order of a ResNet of option A; its blocks begin with bn."""
    sizes = {"stem.weight": (8, 3, 3, 3)}
    for block in range(2):
        for index in (1, 2):
            sizes |= {f"blocks.{block}.norm{index}.{e}": (8,) for e in ("weight", "bias")}
            sizes[f"blocks.{block}.filter{index}.weight"] = (8, 8, 3, 3)
    sizes |= {"last.weight": (8,), "last.bias": (8,), "head.weight": (10, 8), "head.bias": (10,)}
    with pytest.raises(UserError, match="not a ResNet"):
        load({name: torch.zeros(size) for name, size in sizes.items()}, tmp_path)


def test_loading_draws_no_random_numbers(tiny_state, tmp_path):
    state = torch.get_rng_state()
    load(tiny_state, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
