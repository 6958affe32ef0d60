"""Checkpoints: finding and writing one, reading every layout into the canonical state dict.

Reading ends in weights that fit the network, or in one line that says why not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from common.command.cli import REPOSITORY, UserError, log
from common.files.atomic import replace_file
from common.files.untrusted import read_untrusted, serialize
from common.images.data import normalize
from common.images.sources import ASSETS
from common.network.coded import is_coded, load_coded
from common.network.resnet import CLASS_COUNT, ResNet18, Widths

WEIGHTS_NAME = "resnet18_cifar10.pth"
BUNDLED_WEIGHTS = ASSETS / "resnet18_cifar10_fp16.pth"
NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# torchvision's names, and what wrappers put before them.
RENAMES = (
    (re.compile(r"^(module\.|_orig_mod\.)+"), ""),
    (re.compile(r"\.downsample\."), ".shortcut."),
    (re.compile(r"^fc\."), "linear."),
)

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint's path and where it was found, in words."""

    path: Path
    found: str

    def describe(self) -> dict:
        """Return results.json's ``weights``: where the file was found, its bytes and SHA-256."""
        content = self.path.read_bytes()
        return {
            "source": self.found,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
            "coded": is_coded(self.path),
        }


def find_weights(chosen: Path | None, script_dir: Path) -> WeightsFile:
    """Find the checkpoint: ``chosen``; else the usual places; else the bundled weights.

    Raises:
        UserError: ``chosen`` is not a readable file.
    """
    if chosen is not None:
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


def load_model(path: Path) -> ResNet18:
    """Return the network with the checkpoint's weights, in eval mode, FP32, on the CPU.

    Its widths are those of the checkpoint.

    Raises:
        UserError: See :func:`read_checkpoint`; or its numbers are too large to compute with.
    """
    state = read_checkpoint(path)
    model = ResNet18(Widths.of(state))
    model.load_state_dict(state)
    _check_activations(path, model.eval())
    return model


def read_checkpoint(path: Path) -> StateDict:
    """Read a checkpoint in any accepted layout into the canonical state dict (FP32).

    The shapes of the convolutions say the network's widths; all others must fit them. Accepted:
    the course's names or torchvision's with a CIFAR stem, ``module.`` prefixes, nesting
    under one of ``NESTING_KEYS``, any of ``WEIGHT_DTYPES``, ``.pth``, ``.safetensors``, and coded
    networks.

    Raises:
        UserError: The file is missing, no checkpoint, unsafe, damaged, or of another network.
    """
    if is_coded(path):
        return load_coded(path).state_dict()
    tensors = _rename(path, _unnest(path, read_untrusted(path)))
    _check_architecture(path, tensors)
    expected = _expected_state(tensors)
    for name, value in expected.items():  # old checkpoints lack this counter, which eval ignores
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros_like(value, device="cpu"))
    _check_names_and_shapes(path, tensors, expected)
    _check_values(path, tensors)
    dtypes = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()
    }
    if dtypes != {"float32"}:
        name = "the bundled weights" if path == BUNDLED_WEIGHTS else path
        log.info("%s: %s weights, converted to float32", name, " and ".join(sorted(dtypes)))
    return {name: tensors[name].to(value.dtype).contiguous() for name, value in expected.items()}


def _check_activations(path: Path, model: ResNet18) -> None:
    """Run a black, a white and a noisy image: weights may be finite and what they give not."""
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.zeros_like(noise), torch.full_like(noise, 255), noise])
    with torch.inference_mode():
        if not torch.isfinite(model(normalize(images.to(torch.uint8)))).all():
            raise UserError(
                f"{path}: weights so large that the network's logits are NaN or infinite"
            )


def save_checkpoint(content: object, path: Path) -> None:
    """Write ``content`` as ``torch.save`` does, whole or not at all.

    By way of memory: where a disk is full, torch's own writer ends in an internal error.
    """
    replace_file(path, lambda file: file.write(serialize(content)))


def _unnest(path: Path, content: object) -> Mapping[str, object]:
    for key in NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a state dict but a {type(content).__name__}")
    if not content:
        raise UserError(f"{path}: an empty state dict")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: not a state dict: its keys are not names")
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: not a state dict: {_shorten([name])} is no tensor ({kind})")
        if value.is_quantized:
            raise UserError(
                f"{path}: already quantized ({_shorten([name])}); FP32 weights are needed"
            )
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path}: {_shorten([name])} is no dense tensor with values")
    return content


def _rename(path: Path, tensors: Mapping[str, torch.Tensor]) -> StateDict:
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise UserError(f"{path}: holds {_shorten([name])} twice, under two names")
        renamed[name] = value.detach()
    return renamed


def _check_architecture(path: Path, tensors: StateDict) -> None:
    """Name the two commonest mismatches in the user's terms."""
    stem, head = tensors.get("conv1.weight"), tensors.get("linear.weight")
    if stem is not None and stem.shape[-2:] == (7, 7):
        raise UserError(f"{path}: an ImageNet ResNet (7×7 stem); CIFAR-10's has a 3×3 stem")
    if head is not None and head.ndim == 2 and head.shape[0] != CLASS_COUNT:
        raise UserError(f"{path}: a network of {head.shape[0]} classes; CIFAR-10 has 10")


def _expected_state(tensors: StateDict) -> StateDict:
    """Return names, shapes and types, without values, of a network as wide as these tensors say."""
    try:
        widths = Widths.of(tensors)
    except ValueError:
        widths = Widths()  # whatever is wrong is told against the published network
    with torch.device("meta"):
        return ResNet18(widths).state_dict()


def _check_names_and_shapes(path: Path, tensors: StateDict, expected: StateDict) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {_shorten(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {_shorten(unexpected)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ][:1]
    if problems:
        raise UserError(f"{path}: not a ResNet18 for CIFAR-10: {'; '.join(problems)}")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_values(path: Path, tensors: StateDict) -> None:
    for name, value in tensors.items():
        if name.endswith("num_batches_tracked"):
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
