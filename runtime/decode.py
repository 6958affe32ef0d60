"""Turn an INT8 file into ONNX, or run it in ONNX Runtime; this module can be copied beside a model.

    python decode.py model.safetensors model.onnx                  # takes normalised images
    python decode.py model.safetensors model.onnx --input pixels   # takes uint8 pixels
    python decode.py model.safetensors --check model.check         # are the answers the same here?

    from decode import load
    classify = load("model.safetensors")
    logits = classify(pixels)  # uint8 (N, 3, H, W), RGB -> float32 (N, classes)
    names = [classify.facts["classes"][index] for index in logits.argmax(axis=1)]

It needs numpy, safetensors and constriction; onnx to build a model; onnxruntime to run one.

The file is safetensors. An empty tensor is left out of it:

* ``network``: zlib-compressed JSON. ``graph`` lists the operations in execution order; ``weights``
  how the weight of each layer and affine operation is stored (``sparse``, ``dense`` or ``fp32``)
  and its shape; ``ranges`` the index of each operation's scale and zero point, or null where its
  value is not quantized; the rest are facts: classes, mean, std, channel order, resize, settings;
* ``levels``: all INT8 weights, see :func:`decode_levels`; ``fp32``: the other weights;
* ``scales`` and ``biases``: one for each output channel, FP16 where that is exact, else FP32. Equal
  scales that follow one another are stored once, and counted in ``scale_runs``;
* ``value_scales``, ``value_zero_points``: a value's level stands for (level - zero point) * scale.

The metadata hold a mark, a version, and the SHA-256 of the file with zeros in its own place.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import constriction
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

MARK, VERSION = "int8-network", "2"
CHECK_MARK = "int8-check"
# Bounds on what a hostile file can make a reader do.
MAX_FILE_BYTES, MAX_JSON_BYTES = 1 << 31, 1 << 24
MAX_OPERATIONS, MAX_SIZE, MAX_KERNEL = 10_000, 1 << 24, 1 << 12
MAX_VALUES = 1 << 28  # of all operations on one image
MAX_ONNX_VALUES = 4 * MAX_VALUES  # with weights, and each value as it is, rounded and restored
MIN_BITS = 0.01  # of the stream for each weight

IMAGES, PIXELS, LOGITS = "images", "pixels", "logits"
MEANINGS = {
    IMAGES: "float32 (N, C, H, W): pixels / 255, less mean, divided by std, in channel_order",
    PIXELS: "uint8 (N, C, H, W): RGB pixels",
}
OPSET, IR_VERSION = 17, 8  # of 2022
MAX_DIFFERENCE = 0.1  # root mean square of what a check tolerates, in standard deviations of logits


@dataclass(frozen=True)
class Weights:
    """Weights of a convolution, a linear layer or an affine operation.

    Attributes:
        levels: int8 levels, or float32 weights if the layer is not quantized.
        bias: Bias of each output channel; float32.
        scales: Real value of one level in each output channel, float32; None in FP32.
    """

    levels: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None = None


@dataclass(frozen=True)
class Network:
    """A network in plain numbers.

    Attributes:
        operations: Operations in execution order; the first is the input, the last gives the
            logits. Each has a name, a kind, the names of its inputs, and numbers.
        weights: Weights by the operation's name.
        ranges: Scale and zero point of each value that is kept in uint8, by the operation's name.
            An FP32 network has none.
        facts: What is told of it, such as the names of the classes; any JSON values.
    """

    operations: Sequence[Mapping[str, Any]]
    weights: Mapping[str, Weights]
    ranges: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


# --- the file -------------------------------------------------------------------------------------


def read_tensors(content: bytes, mark: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file that bears a mark."""
    tensors = load_tensors(content)
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end]).get("__metadata__", {})
    if metadata.get("format") != mark:
        raise ValueError("without its mark")
    if metadata.get("version") != VERSION:
        raise ValueError(f"version {metadata.get('version', '')[:20]} is not known here")
    digits = metadata.get("sha256", "").encode()
    unsigned = content[:end].replace(digits, b"0" * 64, 1)
    if hashlib.sha256(unsigned + content[end:]).hexdigest().encode() != digits:
        raise ValueError("checksum differs")
    return tensors, metadata


def parse(content: bytes) -> Network:
    """Return the network of a file's content, which may come from anywhere.

    Memory is bounded by the file's size. Whether the operations fit together is left to who uses
    them.

    Raises:
        Exception: The content is damaged or something else.
    """
    tensors, _ = read_tensors(content, MARK)

    def take(name: str, *types: str, size: int | None = None) -> np.ndarray:
        values = tensors.pop(name, np.empty(0, types[0]))
        is_fit = values.ndim == 1 and values.dtype.name in types and size in (None, len(values))
        if not is_fit:
            raise ValueError(f"{name} has another shape or type")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if "scale" in name and not (values > 0).all():
            raise ValueError(f"{name} are not positive")
        return values

    fields = _unpack(take("network", "uint8"))
    operations = fields.pop("graph")
    names = [o["name"] for o in operations if o["kind"] in ("convolution", "linear", "affine")]
    stored = dict(zip(names, fields.pop("weights"), strict=True))
    outputs = [shape[0] for _, shape in stored.values()]
    biases = take("biases", "float16", "float32", size=sum(outputs)).astype(np.float32)
    scales, runs = take("scales", "float16", "float32"), take("scale_runs", "int32")
    if len(scales) != len(runs) or runs.sum(dtype=np.int64) != sum(outputs):
        raise ValueError("scales are not as many as output channels")
    scales = np.repeat(scales.astype(np.float32), runs)
    coded = {name: entry for name, entry in stored.items() if entry[0] != "fp32"}
    levels = dict(zip(coded, decode_levels(take("levels", "uint8"), coded.values()), strict=True))
    counts = [math.prod(shape) for storage, shape in stored.values() if storage == "fp32"]
    fp32 = iter(_split(take("fp32", "float32", size=sum(counts)).copy(), counts))
    weights = {}
    for (name, (storage, shape)), bias, scale in zip(
        stored.items(), _split(biases, outputs), _split(scales, outputs), strict=True
    ):
        found = next(fp32) if storage == "fp32" else levels[name]
        weights[name] = Weights(found.reshape(shape), bias, None if storage == "fp32" else scale)
    value_scales = take("value_scales", "float32").tolist()
    zero_points = take("value_zero_points", "uint8", size=len(value_scales)).tolist()
    ranges = {
        o["name"]: (value_scales[index], zero_points[index])
        for o, index in zip(operations, fields.pop("ranges"), strict=True)
        if index is not None
    }
    if tensors:
        raise ValueError(f"{min(tensors)[:60]} is unexpected")
    return Network(operations, weights, ranges, fields)


def _unpack(packed: np.ndarray) -> dict:
    """Return the JSON of a file, of the types and within the bounds that its readers rely on."""
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(packed.tobytes(), MAX_JSON_BYTES)
    if not unpacker.eof:
        raise ValueError("its description is cut off or too long")
    fields = json.loads(text)
    if not 0 < len(fields["graph"]) <= MAX_OPERATIONS:
        raise ValueError("too many operations, or none")
    for operation in fields["graph"]:
        for key in ("shape", "stride", "dilation", "groups", "kernel", "size", "source_size"):
            _check_sizes(operation.get(key, 1), 1)
        _check_sizes(operation.get("padding", 0), 0)
    for storage, shape in fields["weights"]:
        _check_sizes(shape, 1)
        if storage not in ("sparse", "dense", "fp32"):
            raise ValueError("weights that are stored in an unknown way")
    classes, mean, std = fields["classes"], fields["mean"], fields["std"]
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("class names that are no text")
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (*mean, *std))
    if not numbers or not all(value > 0 for value in std):
        raise ValueError("mean and std are no numbers that images can have")
    if not len(mean) == len(std) == fields["graph"][0]["shape"][0]:
        raise ValueError("images of another number of channels than mean and std have")
    if fields["channel_order"] not in ("rgb", "bgr"):
        raise ValueError("an unknown order of channels")
    _check_sizes(fields["resize"] or 1, 1)
    return fields


def _check_sizes(value: object, least: int) -> None:
    for size in value if isinstance(value, list) else [value]:
        if type(size) is not int or not least <= size < MAX_SIZE:
            raise ValueError("a size that is no positive number, or far too large")


def _split(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(counts)[:-1]) if counts else []


# --- levels ---------------------------------------------------------------------------------------
#
# Most weights of a coded network are zero, and where the others lie is no accident: some channels
# have many, and beside one in a 3×3 kernel there is likely another, of the same sign. So weights of
# a sparse layer are coded as flags (zero or not, sign, how many bits, which), each with the
# probability that its context has. Contexts are made of what was coded before, which the reader
# knows too, in integers alone: the reader may run on another machine. Weights are coded in batches,
# a position of the kernel and a part of the input channels each, whose weights are no context of
# one another. In a dense layer neighbours say next to nothing; each level is one symbol.

LEVELS, LOWEST = 256, -128
CHANNEL_PARTS = 4
ACTIVITIES = 32  # contexts of whether a weight is zero
GROUPS = 4  # of activities, for the flags that follow
BITS = 8  # of a level's magnitude, at most
LEAN = 4  # how far neighbours' signs can point one way
# Where the contexts begin: of zeros, of signs, of the number of bits, of these bits.
SIGNS = ACTIVITIES
LENGTHS = SIGNS + 2 * LEAN + 1
LOWER_BITS = LENGTHS + GROUPS * BITS
CONTEXTS = LOWER_BITS + BITS
EVIDENCE = 4  # how active a weight's output channel, its input channel and its kernel are, and a 1
UNIT = 32  # of the evidence's weights
ADJACENT, APART = 3, 1  # how much a neighbour in the kernel says
# A byte is a step on the scale of odds, from 2^-12 to 2^12; probabilities are rounded to 16 bits.
PROBABILITIES = np.round(65536 / (1 + 2.0 ** ((128 - np.arange(256)) * 12 / 128))) / 65536
BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)
OCTAVE = 8  # steps of a logarithm


def _least_with_log(steps: int) -> int:
    """Return the least n with floor(8 log2 n) = ``steps``, or more where none has as many."""
    n = max(1, int(2 ** (steps / OCTAVE)) - 1)
    while n**OCTAVE < 1 << steps:
        n += 1
    return n


LEAST_WITH_LOG = np.array([_least_with_log(steps) for steps in range(40 * OCTAVE)], np.int64)

Context = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
Code = Callable[[np.ndarray, np.ndarray], np.ndarray]


def decode_levels(
    stream: np.ndarray, stored: Sequence[tuple[str, Sequence[int]]]
) -> list[np.ndarray]:
    """Return the levels of layers (int8), each (outputs, inputs per group, positions of a kernel).

    Args:
        stream: uint8. First the tables of all layers: the frequency of each level (uint16) for a
            dense one; the weights of the evidence (int8) and the probability of each context
            (uint8) for a sparse one. Then a range coder's words (uint32).
        stored: ``dense`` or ``sparse``, and the shape, of each layer.
    """
    shapes = [(shape[0], shape[1], math.prod(shape[2:])) for _, shape in stored]
    sizes = [2 * LEVELS if storage == "dense" else EVIDENCE + CONTEXTS for storage, _ in stored]
    weights, head = sum(map(math.prod, shapes)), sum(sizes)
    if len(stream) < head or (len(stream) - head) % 4 or weights * MIN_BITS > 8 * len(stream):
        raise ValueError("the coded levels are cut off")
    if any(positions > MAX_KERNEL for _, _, positions in shapes):
        raise ValueError("too large a kernel")
    tables = _split(stream[:head], sizes)
    words = np.frombuffer(stream[head:].tobytes(), "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    layers = []
    for (storage, _), shape, table in zip(stored, shapes, tables, strict=True):
        if storage == "dense":
            symbols = decoder.decode(dense_model(table.view("<u2")), math.prod(shape))
            layers.append((symbols + LOWEST).astype(np.int8).reshape(shape))
            continue
        evidence, probabilities = table[:EVIDENCE].view(np.int8), PROBABILITIES[table[EVIDENCE:]]

        def read(contexts: np.ndarray, _: np.ndarray, p: np.ndarray = probabilities) -> np.ndarray:
            return decoder.decode(BERNOULLI, p[contexts]).astype(bool)

        layers.append(np.zeros(shape, np.int8))
        code_layer(layers[-1], weigher(evidence), read)
    if layers and not decoder.maybe_exhausted():
        raise ValueError("there are more coded levels than the network has")
    return layers


def dense_model(table: np.ndarray) -> object:
    """Return the coder's model of levels' frequencies; exact, so equal on every machine."""
    if not table.any():
        raise ValueError("a layer without levels")
    shares = (table.astype(np.float64) / table.sum(dtype=np.int64)).astype(np.float32)
    return constriction.stream.model.Categorical(shares, perfect=False)


def weigher(weights: np.ndarray) -> Context:
    """Return what gives each weight's context of whether it is zero, from weighed evidence."""

    def context(evidence: Sequence[np.ndarray], nonzero: np.ndarray) -> np.ndarray:
        weighed = [int(w) * part for w, part in zip(weights, evidence, strict=True)]
        score = (sum(weighed[1:], weighed[0]) // UNIT).reshape(-1)
        return np.clip(score + ACTIVITIES // 2, 0, ACTIVITIES - 1)

    return context


def code_layer(levels: np.ndarray, context: Context, code: Code) -> None:
    """Pass the levels of a sparse layer by a coder; a decoder fills them in.

    Args:
        levels: int8, (outputs, inputs, positions of the kernel); changed in place.
        context: Returns contexts of zeros (int64, flat) from the evidence, which broadcasts to
            (outputs, inputs), and from which weights are not zero, as an encoder knows.
        code: Returns flags (bool) from their contexts and, as an encoder knows, from these flags.
    """
    outputs, inputs, positions = levels.shape
    order = (4, 1, 3, 5, 7, 0, 2, 6, 8) if positions == 9 else range(positions)  # centre first
    near, width = neighbours(positions), -(-inputs // CHANNEL_PARTS)
    in_row, coded_in_row = np.zeros(outputs, np.int64), 0
    for start in range(0, inputs, width):
        part = levels[:, start : start + width].transpose(2, 0, 1)  # a view
        in_column = np.zeros(part.shape[2], np.int64)
        beside, lean = np.zeros(part.shape, np.int16), np.zeros(part.shape, np.int16)
        for done, position in enumerate(order):
            rows, columns = _density(in_row, coded_in_row), _density(in_column, done * outputs)
            kernel = KERNEL_LOGS[beside[position]]
            evidence = (rows[:, None], columns, kernel, np.int64(UNIT))
            values = _code_batch(part[position], evidence, lean[position], context, code)
            part[position] = values
            sign, size = np.sign(values), np.minimum(np.abs(values.astype(np.int16)), 2)
            for later in order[done + 1 :]:
                beside[later] += size * near[position, later]
                lean[later] += sign * near[position, later]
            in_row += np.count_nonzero(values, axis=1)
            in_column += np.count_nonzero(values, axis=0)
            coded_in_row += part.shape[2]


def neighbours(positions: int) -> np.ndarray:
    """Return how much each position of a kernel says of each other (int16)."""
    side = 3 if positions == 9 else positions
    y, x = np.divmod(np.arange(positions), side)
    away = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    near = np.where((away == 1) & (positions == 9), ADJACENT, APART) * (away > 0)
    return near.astype(np.int16)


def _log2(numbers: np.ndarray | int) -> np.ndarray:
    """Return floor(8 log2 n), exactly, of numbers of at least 1 (int64)."""
    return np.searchsorted(LEAST_WITH_LOG, numbers, side="right") - 1


KERNEL_LOGS = _log2(2 * np.arange(2 * MAX_KERNEL) + 1)


def _density(nonzero: np.ndarray, coded: int) -> np.ndarray:
    """Return the logarithm, in steps, of the share of weights that are not zero in each channel."""
    return _log2(2 * nonzero + 2) - _log2(2 * coded + 16)  # an eighth, while nothing is known


def _code_batch(
    values: np.ndarray, evidence: tuple, lean: np.ndarray, context: Context, code: Code
) -> np.ndarray:
    """Code weights (outputs, inputs) that are no context of one another; return their levels."""
    given = values.reshape(-1).astype(np.int16)  # the magnitude of -128 too
    contexts = context(evidence, values != 0)
    levels = code(contexts, given != 0).astype(np.int16)
    (kept,) = levels.nonzero()
    negative = code(np.clip(lean.reshape(-1)[kept], -LEAN, LEAN) + (SIGNS + LEAN), given[kept] < 0)
    given, magnitudes = np.abs(given[kept]), np.ones(len(kept), np.int64)
    lengths = magnitudes.copy()
    group = LENGTHS + contexts[kept] * GROUPS // ACTIVITIES * BITS
    open_ = np.arange(len(kept))  # those that may have more bits
    for length in range(1, BITS):
        more = code(group[open_] + length - 1, given[open_] >> length > 0)
        open_ = open_[more]
        lengths[open_] += 1
    for bit in range(1, BITS):  # the first after the leading one, and so on
        (longer,) = (lengths > bit).nonzero()
        ones = given[longer] >> (lengths[longer] - 1 - bit) & 1 > 0
        ones = code(np.full(len(longer), LOWER_BITS + bit), ones)
        magnitudes[longer] = magnitudes[longer] << 1 | ones
    levels[kept] = np.where(negative, -magnitudes, magnitudes)
    return levels.astype(np.int8).reshape(values.shape)


# --- ONNX -----------------------------------------------------------------------------------------


def build_model(network: Network, pixels: bool = False) -> Any:
    """Return a network as an ``onnx.ModelProto``: FP32 operators between Q/DQ nodes.

    QuantizeLinear and DequantizeLinear nodes are how ONNX describes quantization; runtimes merge
    each group into one INT8 kernel. Weights are stored in INT8, biases in INT32.

    Args:
        network: Its facts become metadata, each as JSON.
        pixels: Take uint8 ``pixels`` in place of normalised ``images``; see ``MEANINGS``.
    """
    from onnx import TensorProto, helper

    builder, name = _Builder(network), PIXELS if pixels else IMAGES
    source, *operations = network.operations
    builder.add_input(source["name"], pixels)
    for operation in operations:
        builder.add_operation(operation)
    builder.add("Identity", [builder.values[network.operations[-1]["name"]]], LOGITS)
    dtype = TensorProto.UINT8 if pixels else TensorProto.FLOAT
    classes = len(network.facts.get("classes", ())) or "classes"
    graph = helper.make_graph(
        builder.nodes, "network",
        [helper.make_tensor_value_info(name, dtype, ["N", *source["shape"]])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", classes])],
        builder.constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    facts = {"input": MEANINGS[name], **network.facts}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    return model


class _Builder:
    """Adds operation after operation.

    Attributes:
        nodes: Nodes so far.
        constants: Constant tensors so far.
        values: Name in ONNX of each operation's FP32 value.
    """

    def __init__(self, network: Network):
        self._network = network
        self.nodes, self.constants, self.values = [], [], {}

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type | None = None) -> str:
        """Add a constant tensor and return its name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add_input(self, name: str, pixels: bool) -> None:
        """Add the input, which is normalised here if it is pixels."""
        value, facts = PIXELS if pixels else IMAGES, self._network.facts
        if pixels:
            value = self.add("Cast", [value], "pixels/float", to=1)
            for kind, key, by in (
                ("Div", "range", 255), ("Sub", "mean", facts["mean"]), ("Div", "std", facts["std"])
            ):  # fmt: skip
                by = self.constant(f"pixels/{key}", np.reshape(by, (-1, 1, 1)), np.float32)
                value = self.add(kind, [value, by], f"{by}/done")
            if facts["channel_order"] == "bgr":
                last_first = self.constant("pixels/order", [2, 1, 0], np.int64)
                value = self.add("Gather", [value, last_first], "pixels/bgr", axis=1)
        self._keep(name, value)

    def add_operation(self, operation: Mapping[str, Any]) -> None:
        """Add an operation and, if its value is kept in uint8, its quantization."""
        name, inputs = operation["name"], [self.values[source] for source in operation["inputs"]]
        if name in self._network.weights:
            inputs += self._weights(name, operation["inputs"][0])
        self._keep(name, _FORMS[operation["kind"]](self, operation, inputs))

    def _keep(self, name: str, value: str) -> None:
        if name in self._network.ranges:
            scale, zero_point = self._network.ranges[name]
            parameters = [
                self.constant(f"{name}/scale", scale, np.float32),
                self.constant(f"{name}/zero_point", zero_point, np.uint8),
            ]
            levels = self.add("QuantizeLinear", [value, *parameters], f"{name}/uint8")
            value = self.add("DequantizeLinear", [levels, *parameters], f"{name}/kept")
        self.values[name] = value

    def _weights(self, name: str, source: str) -> list[str]:
        """Add the weights and biases of a layer and return the names of their FP32 forms."""
        weights = self._network.weights[name]
        if weights.scales is None:
            return [
                self.constant(f"{name}/weight", weights.levels),
                self.constant(f"{name}/bias", weights.bias),
            ]
        levels = self._dequantize(f"{name}/weight", weights.levels, weights.scales)
        steps = np.float32(self._network.ranges[source][0]) * weights.scales
        bias = np.rint(weights.bias.astype(np.float64) / steps)
        if np.abs(bias).max() > 2**31 - 1:  # a channel whose weights are next to nothing
            return [levels, self.constant(f"{name}/bias", weights.bias)]
        return [levels, self._dequantize(f"{name}/bias", bias.astype(np.int32), steps)]

    def _dequantize(self, name: str, levels: np.ndarray, scales: np.ndarray) -> str:
        zeros = np.zeros_like(scales, levels.dtype)
        operands = {"levels": levels, "scale": scales, "zero_point": zeros}
        names = [self.constant(f"{name}/{key}", value) for key, value in operands.items()]
        return self.add("DequantizeLinear", names, name, axis=0)


# The form of each kind of operation: adds nodes, and returns the name of the value.
_Form = Callable[[_Builder, Mapping[str, Any], list[str]], str]


def _node(kind: str, attributes: Callable[[Mapping], Mapping] = lambda o: {}) -> _Form:
    """Return the form of an operation that one ONNX operator computes."""
    return lambda builder, o, inputs: builder.add(kind, inputs, o["name"], **attributes(o))


def _with_constants(
    kind: str, constants: Callable[[Mapping], Mapping], dtype: type = np.int64
) -> _Form:
    """Return the form of an operator that takes its numbers as further inputs."""

    def form(builder: _Builder, o: Mapping[str, Any], inputs: list[str]) -> str:
        name = o["name"]
        further = [builder.constant(f"{name}/{k}", v, dtype) for k, v in constants(o).items()]
        return builder.add(kind, [*inputs, *further], name)

    return form


def _affine(builder: _Builder, o: Mapping[str, Any], inputs: list[str]) -> str:
    name, channels = o["name"], len(builder._network.weights[o["name"]].bias)
    mean = builder.constant(f"{name}/mean", np.zeros(channels), np.float32)
    variance = builder.constant(f"{name}/variance", np.ones(channels), np.float32)
    return builder.add("BatchNormalization", [*inputs, mean, variance], name, epsilon=0.0)


def _window(o: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kernel_shape": o["kernel"],
        "strides": o["stride"],
        "pads": [*o["padding"]] * 2,
        "ceil_mode": int(o["ceil"]),
    }


def _adaptive_pool(builder: _Builder, o: Mapping[str, Any], inputs: list[str]) -> str:
    """Average windows of unequal size: a product with a matrix of means in each direction."""
    name, (rows, columns) = o["name"], map(window_means, o["source_size"], o["size"])
    columns = builder.constant(f"{name}/columns", columns.T)
    across = builder.add("MatMul", [*inputs, columns], f"{name}/across")
    return builder.add("MatMul", [builder.constant(f"{name}/rows", rows), across], name)


def window_means(old: int, new: int) -> np.ndarray:
    """Return the matrix that averages ``old`` numbers in ``new`` windows, as torch lays them."""
    if old * new > MAX_SIZE:
        raise ValueError("far too large windows")
    matrix = np.zeros((new, old), np.float32)
    for index in range(new):
        start, stop = index * old // new, -(-(index + 1) * old // new)
        matrix[index, start:stop] = 1 / (stop - start)
    return matrix


def _global_pool(builder: _Builder, o: Mapping[str, Any], inputs: list[str]) -> str:
    if o["keep"]:
        return builder.add("GlobalAveragePool", inputs, o["name"])
    mean = builder.add("GlobalAveragePool", inputs, f"{o['name']}/mean")
    return builder.add("Flatten", [mean], o["name"])


def _silu(builder: _Builder, o: Mapping[str, Any], inputs: list[str]) -> str:
    gate = builder.add("Sigmoid", inputs, f"{o['name']}/gate")
    return builder.add("Mul", [*inputs, gate], o["name"])


def _pads(o: Mapping[str, Any]) -> np.ndarray:
    """Return ONNX's padding of an image; torch gives both ends of the last dimension first."""
    pairs = np.reshape(o["padding"], (-1, 2))[::-1]
    return np.pad(pairs, ((4 - len(pairs), 0), (0, 0))).T.ravel()


_FORMS: dict[str, _Form] = {
    "convolution": _node("Conv", lambda o: {
        "strides": o["stride"], "pads": [*o["padding"]] * 2, "dilations": o["dilation"],
        "group": o["groups"],
    }),
    "linear": _node("Gemm", lambda o: {"transB": 1}),
    "affine": _affine,
    "add": _node("Add"),
    "multiply": _node("Mul"),
    "concatenate": _node("Concat", lambda o: {"axis": 1}),
    "max_pool": _node("MaxPool", lambda o: {"dilations": o["dilation"], **_window(o)}),
    "average_pool": _node("AveragePool", lambda o: {
        "count_include_pad": int(o["count_padding"]), **_window(o)
    }),
    "adaptive_average_pool": _adaptive_pool,
    "global_average_pool": _global_pool,
    "flatten": _node("Flatten"),
    "reshape": _with_constants("Reshape", lambda o: {"shape": [-1, *o["shape"]]}),
    "permute": _node("Transpose", lambda o: {"perm": o["order"]}),
    "slice": _with_constants("Slice", lambda o: dict(zip(
        ("starts", "ends", "axes", "steps"), np.array(o["parts"]).T[[1, 2, 0, 3]], strict=True
    ))),
    "pad": _with_constants("Pad", lambda o: {"pads": _pads(o)}),
    "relu": _node("Relu"),
    "relu6": _with_constants("Clip", lambda o: {"low": 0, "high": 6}, np.float32),
    "hardswish": _node("HardSwish"),
    "hardsigmoid": _node("HardSigmoid", lambda o: {"alpha": 1 / 6, "beta": 0.5}),
    "sigmoid": _node("Sigmoid"),
    "silu": _silu,
}  # fmt: skip


# --- running --------------------------------------------------------------------------------------
class FileError(ValueError):
    """A file cannot be used; one line for the user."""


@dataclass(frozen=True)
class Classifier:
    """A network in ONNX Runtime: uint8 RGB pixels (N, C, H, W) to float32 logits (N, classes).

    Attributes:
        session: The ``onnxruntime.InferenceSession``.
        shape: Channels, height and width of an image.
        facts: What the file tells: ``classes``, ``mean``, ``std``, ``channel_order``, ``resize``
            (length of the short side before the middle is cut out, or null) and ``settings``.
    """

    session: Any
    shape: tuple[int, int, int]
    facts: Mapping[str, Any]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits of images."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise ValueError(f"uint8 images of shape (N, {', '.join(map(str, self.shape))}) wanted")
        return self.session.run(None, {PIXELS: pixels})[0]


def load(path: str | Path, threads: int = 0) -> Classifier:
    """Return a file's network, ready to run; by default on all cores.

    Raises:
        FileError: The file is missing, damaged or something else.
    """
    content = _read(path)
    with _telling_damage(path):
        network = parse(content)
        session = start_session(to_onnx(network, pixels=True), threads)
        classify = Classifier(session, tuple(network.operations[0]["shape"]), network.facts)
        logits = classify(np.zeros((1, *classify.shape), np.uint8))
        if logits.shape != (1, len(network.facts["classes"])):
            raise ValueError("another number of logits than of classes")
    return classify


def start_session(model: bytes | str, threads: int = 0) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU, of a model or of the path to one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    # Idle threads that spin would take the cores from whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # WeightBiasQuantization would quantize layers that were left in FP32 between INT8 ones.
    return onnxruntime.InferenceSession(
        model, options, ["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )


def to_onnx(network: Network, pixels: bool = False) -> bytes:
    """Return the content of an ONNX file, checked; see :func:`build_model`.

    Raises:
        Exception: The operations do not fit together, or their values are far too large.
    """
    import onnx

    model = build_model(network, pixels)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = [value.type.tensor_type.shape.dim for value in inferred.graph.value_info]
    if sum(math.prod(max(d.dim_value, 1) for d in shape) for shape in shapes) > MAX_ONNX_VALUES:
        raise ValueError("values too large")
    return model.SerializeToString()


@contextlib.contextmanager
def _telling_damage(path: str | Path) -> Iterator[None]:
    """Turn what a damaged file causes, in too many ways to list, into one line."""
    try:
        yield
    except ImportError:  # a package is missing
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise FileError(f"{path}: damaged or no INT8 network ({reason})") from None


def _read(path: str | Path) -> bytes:
    file = Path(path)
    if not file.is_file():  # to open a named pipe would be to wait for its writer
        raise FileError(f"{path}: no such file")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise FileError(f"{path}: too large")
    return file.read_bytes()


def check(classify: Classifier, path: str | Path) -> tuple[int, int, float]:
    """Compare logits with those in a file that ``--write-check`` wrote.

    Returns:
        Number of images, number of those whose class is the same, and the root mean square of the
        logits' differences, in standard deviations of the logits.

    Raises:
        FileError: The file is damaged, or of another network.
    """
    try:
        tensors, _ = read_tensors(_read(path), CHECK_MARK)
        expected, logits = tensors["logits"], classify(tensors["pixels"])
        same = int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
        difference = np.sqrt(np.square(logits - expected).mean()) / expected.std()
    except (ValueError, KeyError, SafetensorError) as error:
        raise FileError(f"{path}: not a check of this network ({error})") from None
    return len(expected), same, float(difference)


def main(argv: list[str] | None = None) -> int:
    """Write a model, or check one."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n    from")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="INT8 file (.safetensors)")
    parser.add_argument("model", nargs="?", help="ONNX file to write")
    parser.add_argument("--input", choices=MEANINGS, default=IMAGES, help="what the model takes")
    parser.add_argument("--check", metavar="FILE", help="compare logits with those in this file")
    args = parser.parse_args(argv)
    if not args.model and not args.check:
        parser.error("name an ONNX file to write, or --check")
    try:
        if args.model:
            content = _read(args.file)
            with _telling_damage(args.file):
                content = to_onnx(parse(content), args.input == PIXELS)
            Path(args.model).write_bytes(content)
            print(f"{args.model}: {len(content):,} bytes, takes {args.input}")
        if args.check:
            images, same, difference = check(load(args.file), args.check)
            verdict = "passed" if difference <= MAX_DIFFERENCE else "failed"
            print(
                f"{verdict}: {same} of {images} images get the expected class; logits differ by "
                f"{difference:.3f} standard deviations (up to {MAX_DIFFERENCE} is rounding)"
            )
            return 0 if verdict == "passed" else 1
    except (FileError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
