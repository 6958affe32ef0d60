"""What an INT8 file says of its network in JSON: all but the numbers of weights and ranges."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common.network.execution import Layer
from common.network.graph import AFFINE, Graph
from common.network.shapes import infer_shapes
from quantization.files.dense_levels import is_dense
from quantization.int8.network import SAME_RANGE, Int8Layer, Int8Network
from quantization.settings import parse_settings

# Bounds on what a hostile file can make a reader do.
MAX_JSON_BYTES = 1 << 24
MAX_OPERATIONS = 10_000
MAX_VALUES = 1 << 28  # of all operations on one image


@dataclass(frozen=True)
class Description:
    """A network without its numbers, in the order of the graph.

    Attributes:
        network: The network; its tensors have shapes and types, but on the device ``meta``, and
            its ranges are missing.
        dense: Names of the INT8 layers in which few weights are zero.
    """

    network: Int8Network
    dense: tuple[str, ...]

    @classmethod
    def of(cls, network: Int8Network) -> Description:
        """Describe a network."""
        layers = {n: x for n, x in _ordered(network).items() if x.is_int8}
        return cls(network, tuple(name for name, x in layers.items() if is_dense(x.matrix())))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each layer's weight."""
        return {name: layer.weight.shape for name, layer in _ordered(self.network).items()}

    @property
    def sparse(self) -> tuple[str, ...]:
        """The INT8 layers in which many weights are zero, or that are small."""
        layers = _ordered(self.network).items()
        return tuple(name for name, x in layers if x.is_int8 and name not in self.dense)

    @property
    def fp32_shapes(self) -> dict[tuple[str, str], torch.Size]:
        """The shape of each tensor in FP32: by layer, and ``weight`` or ``bias``."""
        network, found = self.network, {}
        for name, layer in _ordered(network).items():
            if not layer.is_int8:
                found[name, "weight"] = layer.weight.shape
        for name in affine_names(network.graph):
            found[name, "weight"] = found[name, "bias"] = network.affine[name].weight.shape
        return found

    @property
    def ranges(self) -> tuple[str, ...]:
        """The values in uint8 that have a range of their own, not that of their step's input."""
        kept = self.network.values_in_uint8()
        return tuple(
            step.name
            for step in self.network.steps()
            if step.name in kept and step.operation.kind not in SAME_RANGE
        )

    def pack(self) -> np.ndarray:
        """Return the description as compressed JSON (uint8)."""
        network = self.network
        fields = {
            "graph": network.graph.to_json(),
            "shapes": [list(shape) for shape in self.shapes.values()],
            "affine": [len(network.affine[name].bias) for name in affine_names(network.graph)],
            "dense": list(self.dense),
            "classes": list(network.classes),
            "mean": list(network.mean),
            "std": list(network.std),
            "settings": asdict(network.settings),
        }
        text = json.dumps(fields, separators=(",", ":")).encode()
        return np.frombuffer(zlib.compress(text, 9), np.uint8)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> Description:
        """Return what :meth:`pack` gave; the content may come from anywhere.

        Raises:
            ValueError, TypeError, KeyError, RuntimeError, zlib.error: No such network can run.
        """
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed.tobytes(), MAX_JSON_BYTES)
        if not unpacker.eof:
            raise ValueError("its description is cut off or too long")
        fields = json.loads(text)
        if len(fields["graph"]) > MAX_OPERATIONS:
            raise ValueError("too many operations")
        network, dense = _blank(fields), fields["dense"]
        if not all(name in network.layers and network.layers[name].is_int8 for name in dense):
            raise ValueError("dense layers that the network does not have")
        _check_that_it_runs(network)
        return cls(network, tuple(name for name in network.layers if name in dense))


def affine_names(graph: Graph) -> tuple[str, ...]:
    """Return the names of the affine operations, in execution order."""
    return tuple(operation.name for operation in graph.operations if operation.kind == AFFINE)


def _ordered(network: Int8Network) -> Mapping[str, Int8Layer]:
    return {name: network.layers[name] for name in network.graph.layers}


def _blank(fields: Mapping) -> Int8Network:
    """Return the network that JSON describes, its tensors without values."""
    graph, settings = Graph.from_json(fields["graph"]), parse_settings(fields["settings"])
    classes, mean, std = (tuple(fields[name]) for name in ("classes", "mean", "std"))
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("class names that are no text")
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (*mean, *std))
    if len(mean) != len(std) or not numbers or not all(value > 0 for value in std):
        raise ValueError("mean and std are no numbers that images can have")
    if not set(settings.fp32_layers) <= set(graph.layers):
        raise ValueError("FP32 layers that the network does not have")
    layers, affine = {}, {}
    with torch.device("meta"):
        for name, sizes in zip(graph.layers, fields["shapes"], strict=True):
            dtype = torch.float32 if name in settings.fp32_layers else torch.int8
            weight = torch.empty([_count(size) for size in sizes], dtype=dtype)
            layers[name] = Int8Layer(weight, torch.empty(len(weight)), torch.empty(len(weight)))
        for name, channels in zip(affine_names(graph), fields["affine"], strict=True):
            affine[name] = Layer(torch.empty(_count(channels)), torch.empty(channels))
    return Int8Network(graph, layers, affine, {}, classes, mean, std, settings)


def _check_that_it_runs(blank: Int8Network) -> None:
    """Check that all weights fit, and that an image gives a logit for each class."""
    shape = [_count(size) for size in blank.graph.operations[0].attributes["shape"]]
    if len(shape) != 3 or shape[0] != len(blank.mean):
        raise ValueError("images of another number of channels than mean and std have")
    weighted = {**blank.layers, **blank.affine}
    shapes = infer_shapes(blank.graph, {name: x.weight.shape for name, x in weighted.items()})
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_VALUES:
        raise ValueError("values too large")
    if shapes[blank.graph.output] != (len(blank.classes),):
        raise ValueError("another number of logits than of classes")


def _count(number: object) -> int:
    if type(number) is not int or not 0 < number < 1 << 31:
        raise ValueError("a size that is no positive number")
    return number
