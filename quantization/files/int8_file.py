"""The file of an INT8 network: safetensors, for plain and for coded weights alike.

:mod:`runtime.decode` describes and decodes it; here it is written, and what was decoded becomes a
network again. There is no pickle, no program and no type of torch's quantization in the file.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.files import entropy
from common.files.atomic import replace_file
from common.files.untrusted import check_file, explained
from common.network.graph import AFFINE, Graph
from quantization.int8.network import SAME_RANGE, Int8Layer, Int8Network, ValueRange
from quantization.settings import parse_settings
from runtime import decode

SUFFIX = ".safetensors"


def save_int8(network: Int8Network, path: Path) -> int:
    """Write a network whole or not at all; return the file's size in bytes."""
    content = seal(_tensors(network), decode.MARK)
    replace_file(path, content)
    return len(content)


def is_int8_file(path: Path) -> bool:
    """Return whether a file bears this format's mark; it may be anything, or nothing."""
    if not path.is_file():  # to open a named pipe would be to wait for its writer
        return False
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == decode.MARK
    except (SafetensorError, OSError):
        return False


def read_int8(path: Path) -> Int8Network:
    """Read what :func:`save_int8` wrote, in bounded memory; any other file is a UserError."""
    check_file(path)
    with explained(f"{path}: damaged or no INT8 network"):
        network = _from_plain(decode.parse(path.read_bytes()))
        _check_that_it_runs(network)
    return network


def to_plain(network: Int8Network) -> decode.Network:
    """Return a network in plain numbers."""
    weights = {n: plain_weights(x.weight, x.bias, x.scales) for n, x in network.layers.items()}
    names = ("classes", "mean", "std", "channel_order", "resize")
    facts = {name: getattr(network, name) for name in names}
    facts["settings"] = asdict(network.settings)
    ranges = {name: (found.scale, found.zero_point) for name, found in network.ranges.items()}
    return decode.Network(network.graph.to_json(), weights, ranges, facts)


def plain_weights(*tensors: torch.Tensor | None) -> decode.Weights:
    """Return a layer's weight, bias and, in INT8, scales in plain numbers."""
    arrays = (x if x is None else np.ascontiguousarray(x.detach().numpy()) for x in tensors)
    return decode.Weights(*arrays)


def seal(tensors: Mapping[str, np.ndarray], mark: str, version: str = decode.VERSION) -> bytes:
    """Return a safetensors file with a mark and a checksum; empty tensors are left out.

    The same tensors give the same bytes: the library alone would write metadata in random order.
    """
    zeros = "0" * 64
    metadata = {"format": mark, "version": version, "sha256": zeros}
    content = save({name: x for name, x in tensors.items() if x.size}, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    content = len(text).to_bytes(8, "little") + text + content[start:]
    digits = hashlib.sha256(content).hexdigest()
    return content.replace(zeros.encode(), digits.encode(), 1)


def _tensors(network: Int8Network) -> dict[str, np.ndarray]:
    """Return what a file holds."""
    plain = to_plain(network)
    weights = [plain.weights[o["name"]] for o in plain.operations if o["name"] in plain.weights]
    coded = [x.levels.reshape(*x.levels.shape[:2], -1) for x in weights if x.scales is not None]
    storage = map(entropy.choose_storage, coded)
    ranges = list(dict.fromkeys(plain.ranges.values()))
    fields = plain.facts | {
        "graph": plain.operations,
        "weights": [
            ("fp32" if x.scales is None else next(storage), x.levels.shape) for x in weights
        ],
        "ranges": [
            ranges.index(plain.ranges[o["name"]]) if o["name"] in plain.ranges else None
            for o in plain.operations
        ],
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    scales = [np.ones_like(x.bias) if x.scales is None else x.scales for x in weights]
    scales, runs = torch.from_numpy(np.concatenate(scales)).unique_consecutive(return_counts=True)
    empty = np.empty(0, np.float32)
    return {
        "network": np.frombuffer(zlib.compress(text, 9), np.uint8),
        "levels": entropy.encode(coded),
        "fp32": np.concatenate([empty, *(x.levels.ravel() for x in weights if x.scales is None)]),
        "scales": _short(scales),
        "scale_runs": runs.numpy().astype(np.int32),
        "biases": _short(torch.from_numpy(np.concatenate([x.bias for x in weights]))),
        "value_scales": np.array([scale for scale, _ in ranges], np.float32),
        "value_zero_points": np.array([zero_point for _, zero_point in ranges], np.uint8),
    }


def _short(values: torch.Tensor) -> np.ndarray:
    """Return float32 values in FP16, where they are the same."""
    return (values.half() if torch.equal(values.half().float(), values) else values).numpy()


def _from_plain(plain: decode.Network) -> Int8Network:
    """Return the network of a file; a ValueError, TypeError or KeyError if it is none."""
    graph, facts = Graph.from_json(plain.operations), plain.facts
    layers = {}
    for name, (levels, bias, scales) in plain.weights.items():
        scales = None if scales is None else torch.from_numpy(scales)
        layers[name] = Int8Layer(torch.from_numpy(levels), scales, torch.from_numpy(bias))
    return Int8Network(
        graph, layers, {name: ValueRange(*x) for name, x in plain.ranges.items()},
        tuple(facts["classes"]), tuple(facts["mean"]), tuple(facts["std"]),
        parse_settings(facts["settings"]), facts["channel_order"], facts["resize"],
    )  # fmt: skip


def _check_that_it_runs(network: Int8Network) -> None:
    """Raise an error unless all weights fit, and an image gives a logit for each class."""
    if sum(map(math.prod, network.shapes.values())) > decode.MAX_VALUES:
        raise ValueError("values too large")
    if network.shapes[network.graph.output] != (len(network.classes),):
        raise ValueError("another number of logits than of classes")
    fp32 = {name for name, layer in network.layers.items() if not layer.is_int8}
    affine = {operation.name for operation in network.graph.operations if operation.kind == AFFINE}
    if fp32 != affine | set(network.settings.fp32_layers):
        raise ValueError("other FP32 layers than its settings name")
    if network.ranges.keys() != network.values_in_uint8():
        raise ValueError("ranges of other values than those in uint8")
    for step in network.steps():
        moves = step.name in network.ranges and step.operation.kind in SAME_RANGE
        if moves and network.ranges[step.name] != network.ranges[step.inputs[0]]:
            raise ValueError("a range that changes where levels are only moved")
