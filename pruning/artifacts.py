"""What a run leaves to use: the pruned model as a plain checkpoint, and packed.

The plain one has the original names, so that every script takes it for ``--weights``. Its zeros
still take four bytes each; the packed one keeps a bit a weight and the values that are left.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.checkpoint import StateDict
from common.cli import UserError
from common.output import replace_file

PRUNED_NAME = "resnet18_cifar10_pruned.pth"
PACKED_NAME = "resnet18_cifar10_pruned_packed.safetensors"
MASK_SUFFIX, VALUES_SUFFIX = ".kept_bits", ".kept_values"
SHAPES_KEY = "shapes"


def pack(state: Mapping[str, torch.Tensor]) -> tuple[StateDict, dict[str, str]]:
    """Pack a state dict: bit masks and values where that is smaller, tensors as they are elsewhere.

    Returns:
        Tensors, and metadata with the shapes of the packed ones, as safetensors stores them.
    """
    packed, shapes = {}, {}
    for name, tensor in state.items():
        kept = (tensor != 0) | tensor.signbit()  # a zero may have a sign, which is kept
        packed_bytes = -(-tensor.numel() // 8) + int(kept.sum()) * tensor.element_size()
        if packed_bytes < tensor.numel() * tensor.element_size():
            bits = np.packbits(kept.numpy().reshape(-1))
            packed[name + MASK_SUFFIX] = torch.from_numpy(bits)
            packed[name + VALUES_SUFFIX] = tensor[kept]
            shapes[name] = list(tensor.shape)
        else:
            packed[name] = tensor.contiguous()
    return packed, {SHAPES_KEY: json.dumps(shapes)}


def save_packed(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict packed, as safetensors, whole or not at all."""
    tensors, metadata = pack(state)
    replace_file(path, lambda file: file.write(save(tensors, metadata)))


def load_packed(path: Path) -> StateDict:
    """Read what :func:`save_packed` wrote: a plain state dict, bit for bit the one that was saved.

    Raises:
        UserError: The file is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {})[SHAPES_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpack(tensors, shapes)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, or no packed model ({reason})") from None


def _unpack(tensors: StateDict, shapes: Mapping[str, list[int]]) -> StateDict:
    for name, shape in shapes.items():
        bits = tensors.pop(name + MASK_SUFFIX).numpy()
        values = tensors.pop(name + VALUES_SUFFIX)
        kept = torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).astype(bool))
        dense = torch.zeros(len(kept), dtype=values.dtype)
        dense[kept] = values
        tensors[name] = dense.reshape(shape)
    return tensors


def compressed_bytes(path: Path) -> int:
    """Return the size of a file after zlib (level 1: random mantissas gain nothing from more)."""
    return len(zlib.compress(path.read_bytes(), level=1))
