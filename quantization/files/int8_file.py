"""The file of an INT8 network: safetensors, for plain and for coded weights alike.

Its tensors, each of which is left out where it would be empty:

* ``network``: compressed JSON (zlib): the graph, the shapes of the weights, the names of the
  classes, mean and std of the images, and how the network was made;
* ``levels``: the weights of the INT8 layers in which many are zero, in the graph's order, as
  :mod:`common.files.entropy` codes them;
* ``dense_levels``: those of the other INT8 layers, as :mod:`quantization.files.dense_levels` codes
  them;
* ``scales`` and ``biases`` of all output channels: FP16 where that is exact, else FP32. Of equal
  scales that follow one another only the first is stored; ``scale_runs`` (int32) counts them;
* ``value_scales`` (FP32) and ``value_zero_points`` (uint8): one for each value in uint8 that has a
  range of its own, in execution order;
* ``fp32``: weights of layers that are kept in FP32, then weights and biases of affine operations.

The metadata holds the mark, the version and a SHA-256 of all that. There is no pickle, no program
and no type of torch's quantization in the file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.files import entropy
from common.files.atomic import replace_file
from common.files.untrusted import check_file, damage_told
from common.network.execution import Layer
from quantization.files import dense_levels
from quantization.files.description import Description, affine_names
from quantization.int8.network import SAME_RANGE, Int8Layer, Int8Network, ValueRange

MARK, VERSION = "int8-network", "1"
SUFFIX = ".safetensors"
HALVES = (torch.float16, torch.float32)
MIN_BITS = 0.01  # of a stream for each weight; a hostile one could say that fewer are enough
DAMAGE = (
    SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    ArithmeticError, RuntimeError, zlib.error,
)  # fmt: skip

Tensors = Mapping[str, torch.Tensor]


def save_int8(network: Int8Network, path: Path) -> int:
    """Write a network whole or not at all; return the file's size in bytes."""
    described, layers = Description.of(network), network.layers
    names = network.graph.layers
    scales, runs = torch.cat([layers[name].scales for name in names]).unique_consecutive(
        return_counts=True
    )
    tensors = {
        "network": torch.from_numpy(described.pack().copy()),
        "scales": _short(scales),
        "scale_runs": runs.to(torch.int32),
        "biases": _short(torch.cat([layers[name].bias for name in names])),
    }
    if described.sparse:
        levels = [layers[name].matrix() for name in described.sparse]
        tensors["levels"] = _as_tensor(entropy.encode(levels))
    if described.dense:
        levels = [layers[name].matrix() for name in described.dense]
        tensors["dense_levels"] = _as_tensor(dense_levels.encode(levels))
    if ranges := [network.ranges[name] for name in described.ranges]:
        tensors["value_scales"] = torch.tensor([r.scale for r in ranges], dtype=torch.float32)
        tensors["value_zero_points"] = torch.tensor(
            [r.zero_point for r in ranges], dtype=torch.uint8
        )
    owners = {**layers, **network.affine}
    if fp32 := [getattr(owners[name], part).flatten() for name, part in described.fp32_shapes]:
        tensors["fp32"] = torch.cat(fp32)
    metadata = {"format": MARK, "version": VERSION}
    metadata["sha256"] = checksum(tensors, metadata)
    replace_file(path, lambda file: file.write(_serialize(tensors, metadata)))
    return path.stat().st_size


def is_int8_file(path: Path) -> bool:
    """Return whether a file bears this format's mark; it may be anything, or nothing."""
    if not path.is_file():  # to open a named pipe would be to wait for its writer
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == MARK
    except (SafetensorError, OSError):
        return False


def read_int8(path: Path) -> Int8Network:
    """Read what :func:`save_int8` wrote; memory is bounded by the file's size.

    Raises:
        UserError: The file is missing, damaged, or not one of ours.
    """
    check_file(path)
    with damage_told(path, "INT8 network", *DAMAGE, RecursionError):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != MARK:
            raise ValueError("without its mark")
        if metadata.get("version") != VERSION:
            raise ValueError(f"version {metadata.get('version', '')[:20]} is not known here")
        if checksum(tensors, metadata) != metadata.get("sha256"):
            raise ValueError("checksum differs")
        return _decode(tensors)


def checksum(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything in a file but the checksum itself."""
    entries = sorted(entry for entry in metadata.items() if entry[0] != "sha256")
    digest = hashlib.sha256(repr(entries).encode())
    for name in sorted(tensors):
        header = f"{name} {tensors[name].dtype} {list(tensors[name].shape)}"
        digest.update(header.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _serialize(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """Return a safetensors file; the same network gives the same bytes.

    The library writes metadata in random order.
    """
    content = save(dict(tensors), metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def _decode(tensors: Tensors) -> Int8Network:
    """Return the network of a file; nothing in it is trusted.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: It is none.
    """
    if tensors["network"].dtype != torch.uint8:
        raise ValueError("network has another type")
    described = Description.unpack(tensors["network"].numpy())
    _check_tensors(tensors, described)
    blank, shapes = described.network, described.shapes
    fp32 = _split(tensors.get("fp32"), described.fp32_shapes)
    weights = _levels(tensors, described)
    weights |= {name: fp32[name, "weight"] for name in shapes if (name, "weight") in fp32}
    outputs = [shape[0] for shape in shapes.values()]
    runs = tensors["scale_runs"].long()
    scales = tensors["scales"].float().repeat_interleave(runs).split(outputs)
    biases = tensors["biases"].float().split(outputs)
    layers = {
        name: Int8Layer(weights[name], scale, bias)
        for name, scale, bias in zip(shapes, scales, biases, strict=True)
    }
    affine = {
        name: Layer(fp32[name, "weight"], fp32[name, "bias"]) for name in affine_names(blank.graph)
    }
    return replace(blank, layers=layers, affine=affine, ranges=_ranges(tensors, described))


def _levels(tensors: Tensors, described: Description) -> dict[str, torch.Tensor]:
    """Return the INT8 weights."""
    shapes, levels = described.shapes, {}
    if described.sparse:
        sizes = [
            (shape[0], shape[1], shape[2:].numel())
            for shape in (shapes[name] for name in described.sparse)
        ]
        found = entropy.decode(_bytes(tensors["levels"]), sizes)
        levels |= zip(described.sparse, found, strict=True)
    if described.dense:
        counts = [shapes[name].numel() for name in described.dense]
        found = dense_levels.decode(_bytes(tensors["dense_levels"]), counts)
        levels |= zip(described.dense, found, strict=True)
    return {name: torch.from_numpy(x).reshape(shapes[name]) for name, x in levels.items()}


def _ranges(tensors: Tensors, described: Description) -> dict[str, ValueRange]:
    """Return the ranges of all values in uint8."""
    ranges, network = {}, described.network
    own = iter(())
    if described.ranges:
        scales, zero_points = tensors["value_scales"], tensors["value_zero_points"]
        own = zip(scales.tolist(), zero_points.tolist(), strict=True)
    kept = network.values_in_uint8()
    for step in network.steps():
        if step.name in kept:
            shares = step.operation.kind in SAME_RANGE
            ranges[step.name] = ranges[step.inputs[0]] if shares else ValueRange(*next(own))
    return ranges


def _check_tensors(tensors: Tensors, described: Description) -> None:
    """Check names, shapes, types and values of a file's tensors."""
    shapes, runs = described.shapes, tensors["scale_runs"]
    outputs, ranges = sum(shape[0] for shape in shapes.values()), len(described.ranges)
    expected = {
        "network": (tensors["network"].flatten().shape, (torch.uint8,)),
        "scales": (runs.shape[:1], HALVES),
        "scale_runs": (runs.flatten().shape, (torch.int32,)),
        "biases": ((outputs,), HALVES),
    }
    for key, names in (("levels", described.sparse), ("dense_levels", described.dense)):
        if names:
            expected[key] = (tensors[key].flatten().shape, (torch.uint8,))
            weights = sum(shapes[name].numel() for name in names)
            if weights * MIN_BITS > 8 * tensors[key].numel():
                raise ValueError("the coded levels are cut off")
    if ranges:
        expected["value_scales"] = ((ranges,), (torch.float32,))
        expected["value_zero_points"] = ((ranges,), (torch.uint8,))
    if fp32 := sum(shape.numel() for shape in described.fp32_shapes.values()):
        expected["fp32"] = ((fp32,), (torch.float32,))
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise ValueError(f"{odd[:60]} is missing or unexpected")
    for name, (shape, dtypes) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise ValueError(f"{name} has another shape or type")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if "scale" in name and not (tensor > 0).all():
            raise ValueError(f"{name} are not positive")
    if int(runs.sum()) != outputs:
        raise ValueError("scales are not as many as output channels")


def _split(
    values: torch.Tensor | None, shapes: Mapping[tuple[str, str], torch.Size]
) -> dict[tuple[str, str], torch.Tensor]:
    if values is None:
        return {}
    parts = values.split([shape.numel() for shape in shapes.values()])
    return {key: x.reshape(shapes[key]) for key, x in zip(shapes, parts, strict=True)}


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return np.ascontiguousarray(tensor.numpy()).tobytes()


def _short(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values in FP16, where they are the same."""
    return values.half() if torch.equal(values.half().float(), values) else values
