"""An INT8 model packed: a bit a weight, the values of those that are not zero, both compressed.

A pruned network's zeros stay zeros in INT8 (its weights are quantized symmetrically), so most
weights are one bit in a mask. The file is safetensors:

* ``weights.kept_bits.xz``: a bit for each weight of every layer, in network order, through LZMA;
* ``weights.kept_values.xz``: the weights whose bit is set, through LZMA;
* biases, the weights' scales, the activations' scales and zero points as they are;
* metadata: how the model was made, and the SHA-256 of all that.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.fx import GraphModule

from common import weight_coding
from common.cli import UserError
from common.output import replace_file
from quantization import conversion, engines
from quantization.settings import Settings, parse_settings

FORMAT = "resnet18-cifar10-int8-packed-2"
SUFFIX = ".safetensors"
BITS, VALUES = "weights.kept_bits.xz", "weights.kept_values.xz"
SCALES_SUFFIX = ".scales"  # of a weight, one an output channel

State = Mapping[str, object]


def save_packed(model: GraphModule, settings: Settings, path: Path) -> int:
    """Write an INT8 model packed, whole or not at all; return its size in bytes.

    Args:
        model: From :func:`quantization.conversion.convert`.
        settings: How it was made.
        path: Of the file.
    """
    tensors = pack(model.state_dict())
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(asdict(settings)),
        "torch": str(torch.__version__),
    }
    metadata["sha256"] = _checksum(tensors, metadata)
    replace_file(path, lambda file: file.write(save(tensors, metadata)))
    return path.stat().st_size


def load_packed(path: Path) -> tuple[GraphModule, Settings]:
    """Read what :func:`save_packed` wrote: the very same INT8 model, and how it was made.

    Raises:
        UserError: The file is missing, damaged, not one of ours, or for an engine that is not here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError("no packed INT8 model")
        if _checksum(tensors, metadata) != metadata.get("sha256"):
            raise ValueError("checksum differs")
        settings = parse_settings(json.loads(metadata.get("settings", "")))
        model = conversion.build_skeleton(settings)
        state = model.state_dict()  # carries the versions that torch's modules ask for
        state |= unpack(tensors, state)
        with engines.quiet_torch(settings.engine):
            model.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, lzma.LZMAError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: damaged or no packed INT8 model ({reason})") from None
    return model, settings


# --- packing -------------------------------------------------------------------------------------


def pack(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of the packed file for the state dict of an INT8 model.

    Raises:
        ValueError: A weight is not quantized symmetrically; its zeros would not be zeros.
    """
    weights, packed = [], {}
    for name, tensor in _named_tensors(state):
        if not _is_weight(tensor):
            packed[name] = tensor.contiguous()
            continue
        if tensor.is_quantized:
            packed[name + SCALES_SUFFIX] = _symmetric_scales(name, tensor)
        weights.append(_plain(tensor))
    for name, stream in zip((BITS, VALUES), weight_coding.encode(weights), strict=True):
        packed[name] = torch.from_numpy(np.frombuffer(stream, np.uint8).copy())
    return packed


def unpack(tensors: Mapping[str, torch.Tensor], template: State) -> dict[str, object]:
    """Return the state dict that :func:`pack` was given.

    Args:
        tensors: Of the packed file; nothing in them is trusted.
        template: The state dict of a model of the same structure: says every name, shape and type.

    Raises:
        ValueError, lzma.LZMAError: The tensors are not those of such a model.
    """
    named = dict(_named_tensors(template))
    weights = {name: tensor for name, tensor in named.items() if _is_weight(tensor)}
    expected = {name: tensor for name, tensor in named.items() if name not in weights}
    for name, weight in weights.items():
        if weight.is_quantized:
            expected[name + SCALES_SUFFIX] = weight.q_per_channel_scales().float()
    _check_plain(tensors, expected)
    restored = {name: tensors[name] for name in named if name not in weights}
    streams = (tensors[name].numpy().tobytes() for name in (BITS, VALUES))
    dense = weight_coding.decode(*streams, [_plain(weight) for weight in weights.values()])
    for (name, weight), values in zip(weights.items(), dense, strict=True):
        restored[name] = values
        if weight.is_quantized:
            scales = tensors[name + SCALES_SUFFIX].double()
            zero_points = torch.zeros(len(scales), dtype=torch.int64)
            restored[name] = torch._make_per_channel_quantized_tensor(
                values, scales, zero_points, axis=0
            )
    return {name: _like(value, name, restored) for name, value in template.items()}


def _named_tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a state dict; the linear layer's weight and bias lie in a tuple."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{index}", tensor) for index, tensor in enumerate(value))


def _like(value: object, name: str, restored: Mapping[str, torch.Tensor]) -> object:
    """Return what stands for ``value`` of the template: the inverse of :func:`_named_tensors`."""
    if isinstance(value, torch.Tensor):
        return restored[name]
    if isinstance(value, tuple):
        return tuple(restored[f"{name}.{index}"] for index in range(len(value)))
    return value  # the type of the linear layer's weights


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.is_quantized or tensor.ndim > 1


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.int_repr() if weight.is_quantized else weight


def _symmetric_scales(name: str, weight: torch.Tensor) -> torch.Tensor:
    scales = weight.q_per_channel_scales()
    if weight.q_per_channel_zero_points().any() or (scales.float() != scales).any():
        raise ValueError(f"{name} is not quantized symmetrically with FP32 scales")
    return scales.float()


def _check_plain(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check what is not packed: names, shapes, types, and ranges that the kernels rely on."""
    if tensors.keys() != expected.keys() | {BITS, VALUES}:
        odd = sorted(tensors.keys() ^ (expected.keys() | {BITS, VALUES}))[0]
        raise ValueError(f"{odd[:60]} is missing or unexpected")
    for name, like in expected.items():
        tensor = tensors[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{name} has another shape or type")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if "scale" in name and not (tensor > 0).all():
            raise ValueError(f"{name} is not positive")
        if "zero_point" in name and not ((tensor >= 0) & (tensor <= 255)).all():
            raise ValueError(f"{name} is outside of 0 to 255")
    for name in (BITS, VALUES):
        if tensors[name].dtype != torch.uint8:
            raise ValueError(f"{name} holds no bytes")


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything but the checksum itself."""
    entries = sorted(entry for entry in metadata.items() if entry[0] != "sha256")
    digest = hashlib.sha256(repr(entries).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
