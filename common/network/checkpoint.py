"""Checkpoints: finding and writing one, and building the network that its weights belong to.

Reading ends in a network with weights that fit it, or in one line that says why not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.command.cli import REPOSITORY, UserError, log
from common.files.atomic import replace_file
from common.files.untrusted import MAX_UNPACKED_BYTES, read_untrusted, serialize
from common.images.sources import ASSETS
from common.network.layouts import StateDict, Statistics, read_layout, shorten
from common.network.models import build_model, expected_names
from common.network.renaming import canonical_names
from common.network.reshape import with_tensors
from common.network.resnet import ResNet, ResNetShape
from common.network.tracing import trace
from quantization.files.int8_file import is_int8_file, read_int8

WEIGHTS_NAME = "resnet18_cifar10.pth"
BUNDLED_WEIGHTS = ASSETS / "resnet18_cifar10_fp16.pth"
WEIGHT = ".weight"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint.

    Attributes:
        path: Path of the file.
        found: Where it was found, in words.
        key: Key of the state dict to take, if the user chose one.
    """

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

    Args:
        chosen: FILE, or FILE:KEY for one of the state dicts in a file.
        script_dir: Folder of the script.

    Raises:
        UserError: ``chosen`` is not a readable file.
    """
    if chosen is not None:
        file, _, key = str(chosen).rpartition(":")
        if file and not chosen.exists() and Path(file).exists():
            return WeightsFile(Path(file), f"--weights {chosen}", key)
        return WeightsFile(chosen, f"--weights {chosen}")
    places = {
        "the working directory": Path.cwd(),
        "the script's folder": script_dir,
        "the repository root": REPOSITORY,
    }
    for name, folder in places.items():
        if (folder / WEIGHTS_NAME).is_file():
            return WeightsFile(folder / WEIGHTS_NAME, f"{WEIGHTS_NAME} in {name}")
    return WeightsFile(BUNDLED_WEIGHTS, "the bundled weights")


@dataclass(frozen=True)
class Loaded:
    """A network with the weights of a checkpoint.

    Attributes:
        model: The network, in eval mode, FP32, on the CPU.
        family: Name of its architecture, such as ``resnet18-cifar`` or ``torchvision:vgg11_bn``.
        statistics: Mean and std for the images, if the checkpoint holds them.
        own_names: For each layer its name in the checkpoint.
    """

    model: nn.Module
    family: str
    statistics: Statistics | None = None
    own_names: Mapping[str, str] = field(default_factory=dict)


def load_model(path: Path) -> nn.Module:
    """Return the ResNet of a checkpoint; see :func:`load_network`."""
    return load_network(WeightsFile(path, str(path))).model


def load_network(
    file: WeightsFile, model: str | None = None, max_pool: bool | None = None
) -> Loaded:
    """Return the network with the checkpoint's weights.

    Args:
        file: Checkpoint in any accepted layout, see :mod:`common.network.layouts`; its weights are
            of one of ``WEIGHT_DTYPES``.
        model: The network, as ``--model`` names it; by default a ResNet, whose depth, widths and
            number of classes are those of the checkpoint.
        max_pool: Whether a max pool follows a ResNet's first convolution, see
            :class:`common.network.resnet.ResNet`.

    Raises:
        UserError: The file is missing, no checkpoint, unsafe, damaged, or of another network.
    """
    path = file.path
    if is_int8_file(path):
        return _load_int8(path, model, max_pool)
    content = read_untrusted(path)
    layout = read_layout(path, content, file.key, expected_names(model) if model else ())
    tensors = layout.tensors
    _check_size(path, tensors)
    own: dict[str, str] = {}
    if model is None:
        tensors, expected, own = _fit_resnet(path, tensors, max_pool)
        family = expected.shape.family
    else:
        expected, family = _narrowed(build_model(model, tensors), tensors), model
    state = _fit(path, tensors, expected.state_dict(), family)
    for note in layout.notes:
        log.info("%s: %s", _name(path), note)
    expected.load_state_dict(state, assign=True)
    own_names = {
        name.removesuffix(WEIGHT): layout.prefix + own.get(name, name).removesuffix(WEIGHT)
        for name in tensors
        if name.endswith(WEIGHT)
    }
    return Loaded(expected.eval(), family, layout.statistics, own_names)


def _narrowed(model: nn.Module, tensors: StateDict) -> nn.Module:
    """Return the network as narrow as the tensors, if these are those of its slim form."""
    expected = model.state_dict()
    if not all(
        name in tensors
        and tensors[name].ndim == value.ndim
        and all(new <= old for new, old in zip(tensors[name].shape, value.shape, strict=True))
        for name, value in expected.items()
        if value.ndim
    ):
        return model
    blank = {
        name: torch.empty(tensors[name].shape, dtype=value.dtype, device="meta")
        for name, value in expected.items()
        if name in tensors
    }
    blank = {name: blank.get(name, value) for name, value in expected.items()}
    return with_tensors(model, blank)


def _load_int8(path: Path, model: str | None, max_pool: bool | None) -> Loaded:
    """Return the FP32 network of an INT8 file; its batch norms do nothing but add the biases."""
    network = read_int8(path)
    state = {f"{name}.weight": layer.dense().weight for name, layer in network.layers.items()}
    if model is None:
        state, built, _ = _fit_resnet(path, state, max_pool)
        family = built.shape.family
    else:
        built, family = build_model(model, state), model
    traced = trace(built.eval(), network.graph.operations[0].attributes["shape"])
    if set(traced.network.graph.layers) != set(network.layers) or network.affine:
        raise UserError(f"{path}: its layers are not those of {family}")
    for name, layer in network.layers.items():
        state[f"{traced.norms.get(name, name)}.bias"] = layer.bias
        if (norm := traced.norms.get(name)) is not None:
            ones = torch.ones_like(layer.bias)
            epsilon = built.get_submodule(norm).eps
            state |= {f"{norm}.weight": ones, f"{norm}.running_var": ones - epsilon}
            state[f"{norm}.running_mean"] = torch.zeros_like(layer.bias)
    built.load_state_dict(_fit(path, state, built.state_dict(), family), assign=True)
    return Loaded(built, family, (network.mean, network.std))


def read_checkpoint(path: Path) -> StateDict:
    """Read the checkpoint of a ResNet as a state dict in FP32; see :func:`load_network`."""
    return dict(load_model(path).state_dict())


def _fit_resnet(
    path: Path, tensors: StateDict, max_pool: bool | None
) -> tuple[StateDict, ResNet, dict[str, str]]:
    """Return the tensors under the names of a ResNet, and that ResNet without weights.

    The dictionary gives for each of these names the checkpoint's own, where they differ.
    """
    names = {} if "conv1.weight" in tensors else canonical_names(tensors) or {}
    if names:
        log.info("%s: its names are mapped, by order and shape, to conv1 … linear", _name(path))
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            model = ResNet(ResNetShape.of(tensors), max_pool)
    except ValueError as error:
        raise UserError(
            f"{path}: not a ResNet ({error}) but a network with {shorten([*tensors])}; --model "
            "says which network it is"
        ) from None
    return tensors, model, {new: old for old, new in names.items()}


def _fit(path: Path, tensors: StateDict, expected: StateDict, family: str) -> StateDict:
    """Return the tensors as the expected state dict has them: in its order and its types."""
    tensors = dict(tensors)
    for name, value in expected.items():  # old checkpoints lack this counter, which eval ignores
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
    _check_names_and_shapes(path, tensors, expected, family)
    _check_values(path, tensors, expected)
    dtypes = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()
    }
    if dtypes != {"float32"}:
        found = " and ".join(sorted(dtypes))
        log.info("%s: %s weights, converted to float32", _name(path), found)
    return {name: tensors[name].to(value.dtype).contiguous() for name, value in expected.items()}


def _name(path: Path) -> Path | str:
    return "the bundled weights" if path == BUNDLED_WEIGHTS else path


def save_checkpoint(content: object, path: Path) -> None:
    """Write ``content`` as ``torch.save`` does, whole or not at all.

    By way of memory: where a disk is full, torch's own writer ends in an internal error.
    """
    replace_file(path, lambda file: file.write(serialize(content)))


def _check_size(path: Path, tensors: StateDict) -> None:
    """Refuse tensors that are views of few numbers and claim to be many."""
    count = sum(tensor.numel() for tensor in tensors.values())
    if count * torch.float32.itemsize > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: {count:,} numbers are too many for a checkpoint")


def _check_names_and_shapes(
    path: Path, tensors: StateDict, expected: StateDict, family: str
) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {shorten(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {shorten(unexpected)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ][:1]
    if problems:
        raise UserError(f"{path}: not a {family}: {'; '.join(problems)}")


def _check_values(path: Path, tensors: StateDict, expected: StateDict) -> None:
    for name, value in tensors.items():
        if not expected[name].is_floating_point():
            continue
        if value.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{path}: {name} is {value.dtype}; 16-, 32- or 64-bit floating point is needed"
            )
        # In FP32, what will be computed with: an FP64 value may be finite there only.
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {name} holds negative variances")
