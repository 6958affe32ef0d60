"""Checkpoints: finding and writing one, and building the network that its weights belong to.

Reading ends in a network with weights that fit it, or in one line that says why not.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.checkpoints.entries import StateDict, Statistics, fit_tensors, shorten
from common.checkpoints.layouts import read_layout
from common.checkpoints.models import build_model, narrowed
from common.checkpoints.renaming import canonical_names
from common.checkpoints.resnet import ResNet, ResNetShape
from common.command.cli import REPOSITORY, UserError, log
from common.files.atomic import replace_file
from common.files.untrusted import MAX_UNPACKED_BYTES, read_untrusted, serialize
from common.images.cifar import ASSETS
from common.network.tracing import trace
from quantization.files.int8_file import is_int8_file, read_int8

WEIGHTS_NAME = "resnet18_cifar10.pth"
BUNDLED_WEIGHTS = ASSETS / "resnet18_cifar10_fp16.pth"
WEIGHT = ".weight"


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint: its path, where it was found, and the key of the state dict to take, if any."""

    path: Path
    found: str
    key: str | None = None

    def describe(self) -> dict:
        """Return results.json's ``weights``: where the file was found, its bytes and SHA-256."""
        content = self.path.read_bytes()
        return {
            "source": self.found,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
            "coded": is_int8_file(self.path),
        }


def find_weights(chosen: Path | None, script_dir: Path) -> WeightsFile:
    """Find the checkpoint: ``chosen``; else the usual places; else the bundled weights.

    ``chosen`` is FILE, or FILE:KEY for one of the state dicts in a file.
    """
    if chosen is not None:
        file, _, key = str(chosen).rpartition(":")
        if file and not chosen.exists() and Path(file).exists():
            return WeightsFile(Path(file), f"--weights {chosen}", key)
        return WeightsFile(chosen, f"--weights {chosen}")
    for place, folder in (
        ("the working directory", Path.cwd()),
        ("the script's folder", script_dir),
        ("the repository root", REPOSITORY),
    ):
        if (folder / WEIGHTS_NAME).is_file():
            return WeightsFile(folder / WEIGHTS_NAME, f"{WEIGHTS_NAME} in {place}")
    return WeightsFile(BUNDLED_WEIGHTS, "the bundled weights")


@dataclass(frozen=True)
class Loaded:
    """A network with the weights of a checkpoint."""

    model: nn.Module  # in eval mode, FP32, on the CPU
    family: str  # name of the architecture, such as resnet18-cifar or torchvision:vgg11_bn
    statistics: Statistics | None = None  # mean and std, if the checkpoint holds them
    own_names: Mapping[str, str] = field(default_factory=dict)  # layers' names in the checkpoint


def load_model(path: Path) -> nn.Module:
    """Return the ResNet of a checkpoint; see :func:`load_network`."""
    return load_network(WeightsFile(path, str(path))).model


def load_network(
    file: WeightsFile, model: str | None = None, max_pool: bool | None = None
) -> Loaded:
    """Return the network with the checkpoint's weights.

    Args:
        file: Checkpoint in any layout that :mod:`common.checkpoints.layouts` reads.
        model: The network, as ``--model`` names it; by default the ResNet of the checkpoint.
        max_pool: Whether a max pool follows a ResNet's first convolution.

    Raises:
        UserError: The file is missing, no checkpoint, unsafe, damaged, or of another network.
    """
    path = file.path
    if is_int8_file(path):
        return _load_int8(path, model, max_pool)
    content = read_untrusted(path)
    known = set(build_model(model, {}).state_dict()) if model else ()
    tensors, statistics, prefix = read_layout(path, content, file.key, known)
    count = sum(tensor.numel() for tensor in tensors.values())
    if count * torch.float32.itemsize > MAX_UNPACKED_BYTES:  # views of few numbers can claim this
        raise UserError(f"{path}: {count:,} numbers are too many for a checkpoint")
    tensors, network, family, own = _build(path, tensors, model, max_pool)
    state = fit_tensors(path, tensors, network.state_dict(), family)
    dtypes = {str(t.dtype).split(".")[1] for t in tensors.values() if t.is_floating_point()}
    if dtypes != {"float32"}:
        name = "the bundled weights" if path == BUNDLED_WEIGHTS else path
        log.info("%s: %s weights, converted to float32", name, " and ".join(sorted(dtypes)))
    network.load_state_dict(state, assign=True)
    own_names = {
        name.removesuffix(WEIGHT): prefix + own.get(name, name).removesuffix(WEIGHT)
        for name in tensors
        if name.endswith(WEIGHT)
    }
    return Loaded(network.eval(), family, statistics, own_names)


def _load_int8(path: Path, model: str | None, max_pool: bool | None) -> Loaded:
    """Return the FP32 network of an INT8 file; its batch norms do nothing but add the biases."""
    network = read_int8(path)
    state = {f"{name}.weight": layer.dense().weight for name, layer in network.layers.items()}
    state, built, family, _ = _build(path, state, model, max_pool)
    blank = copy.deepcopy(built).eval().to("meta")  # torchvision's has some real tensors
    traced = trace(blank, network.graph.operations[0].attributes["shape"])
    if set(traced.network.graph.layers) != set(network.layers):
        raise UserError(f"{path}: its layers are not those of {family}")
    for name, layer in network.layers.items():
        norm = traced.norms.get(name)
        state[f"{norm or name}.bias"] = layer.bias
        if norm is not None:
            ones = torch.ones_like(layer.bias)
            epsilon = built.get_submodule(norm).eps
            state |= {f"{norm}.weight": ones, f"{norm}.running_var": ones - epsilon}
            state[f"{norm}.running_mean"] = torch.zeros_like(layer.bias)
    built = narrowed(built, state)
    built.load_state_dict(fit_tensors(path, state, built.state_dict(), family), assign=True)
    return Loaded(built.eval(), family, (network.mean, network.std))


def _build(
    path: Path, tensors: StateDict, model: str | None, max_pool: bool | None
) -> tuple[StateDict, nn.Module, str, dict[str, str]]:
    """Return the tensors under a network's names, that network without weights, and its family.

    The dictionary gives for each name the checkpoint's own, where they differ.
    """
    if model is not None:
        return tensors, narrowed(build_model(model, tensors), tensors), model, {}
    names = {} if "conv1.weight" in tensors else canonical_names(tensors) or {}
    if names:
        log.info("%s: its names are mapped, by order and shape, to conv1 … linear", path)
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            resnet = ResNet(ResNetShape.of(tensors), max_pool)
    except ValueError as error:
        raise UserError(
            f"{path}: not a ResNet ({error}) but a network with {shorten([*tensors])}; --model "
            "says which network it is, such as --model torchvision:mobilenet_v2"
        ) from None
    return tensors, resnet, resnet.shape.family, {new: old for old, new in names.items()}


def save_checkpoint(content: object, path: Path) -> None:
    """Write ``content`` as ``torch.save`` does, whole or not at all.

    It is serialized in memory first: on a full disk, torch's own writer ends in an internal error.
    """
    replace_file(path, serialize(content))
