"""What a run leaves to use: the pruned model as a plain checkpoint, and packed.

The plain one has the original names, so that every script takes it for ``--weights``. Its zeros
still take four bytes each; the packed one keeps a bit a weight and the values that are left, both
through LZMA.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common import weight_coding
from common.checkpoint import StateDict
from common.cli import UserError
from common.output import replace_file

PRUNED_NAME = "resnet18_cifar10_pruned.pth"
PACKED_NAME = "resnet18_cifar10_pruned_packed.safetensors"
BITS, VALUES = "weights.kept_bits.xz", "weights.kept_values.xz"
SHAPES_KEY = "shapes"


def pack(state: Mapping[str, torch.Tensor]) -> tuple[StateDict, dict[str, str]]:
    """Pack a state dict: mask and values where that is smaller, tensors as they are elsewhere.

    Returns:
        Tensors, and metadata with the shapes of the packed ones, as safetensors stores them.
    """
    sparse = {name: tensor for name, tensor in state.items() if _pays(tensor)}
    packed = {name: tensor.contiguous() for name, tensor in state.items() if name not in sparse}
    if sparse:
        streams = weight_coding.encode(list(sparse.values()))
        for name, stream in zip((BITS, VALUES), streams, strict=True):
            packed[name] = torch.from_numpy(np.frombuffer(stream, np.uint8).copy())
    shapes = {name: list(tensor.shape) for name, tensor in sparse.items()}
    return packed, {SHAPES_KEY: json.dumps(shapes)}


def _pays(tensor: torch.Tensor) -> bool:
    """Return whether a bit a value costs less than the zeros of an FP32 tensor."""
    zeros = tensor.numel() - int(tensor.count_nonzero())
    return tensor.dtype == torch.float32 and tensor.numel() / 8 < 4 * zeros


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
    except (SafetensorError, lzma.LZMAError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, or no packed model ({reason})") from None


def _unpack(tensors: StateDict, shapes: Mapping[str, list[int]]) -> StateDict:
    if not shapes:
        return tensors
    streams = [tensors.pop(name).numpy().tobytes() for name in (BITS, VALUES)]
    # Shapes may come from anywhere: nothing is allocated before the streams prove to be as long.
    like = [torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes.values()]
    return tensors | dict(zip(shapes, weight_coding.decode(*streams, like), strict=True))


def compressed_bytes(path: Path) -> int:
    """Return the size of a file after zlib (level 1: random mantissas gain nothing from more)."""
    return len(zlib.compress(path.read_bytes(), level=1))
