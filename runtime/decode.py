"""Turn an INT8 file into ONNX, or run it in ONNX Runtime; this module can be copied beside a model.

    python decode.py model.safetensors model.onnx                  # takes normalised images
    python decode.py model.safetensors model.onnx --input pixels   # takes uint8 pixels
    python decode.py model.safetensors --check model.check         # are the answers the same here?

    from decode import load
    classify = load("model.safetensors")
    logits = classify(pixels)  # uint8 (N, 3, H, W), RGB -> float32 (N, classes)
    names = [classify.facts["classes"][index] for index in logits.argmax(axis=1)]

It needs numpy, safetensors and constriction; onnx to build a model; onnxruntime to run one.

A file is safetensors: the TENSORS below, of which an empty one is left out. Its metadata hold a
mark, a version, and the SHA-256 of the file with zeros in its own place.
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import constriction
import numpy as np
from safetensors.numpy import load as load_tensors

MARK, CHECK_MARK, VERSION = "int8-network", "int8-check", "2"
# Bounds on what a hostile file can make a reader do.
MAX_FILE_BYTES, MAX_JSON_BYTES = 1 << 31, 1 << 24
MAX_OPERATIONS, MAX_SIZE, MAX_KERNEL = 10_000, 1 << 24, 1 << 12
MAX_VALUES = 1 << 28  # of all operations on one image
MAX_ONNX_VALUES = 4 * MAX_VALUES  # with weights, and each value as it is, rounded and restored
FEW_WEIGHTS, MIN_BITS = 1 << 24, 0.01  # for each weight of a stream of more, so many bits
SIZES = {"shape", "stride", "dilation", "groups", "kernel", "size", "source_size", "padding"}
TENSORS = {
    "network": ["uint8"],  # JSON, see _unpack
    "levels": ["uint8"],  # all INT8 weights, see decode_levels
    "fp32": ["float32"],  # the other weights
    "biases": ["float32", "float16"],  # of each output channel; FP16 where that is exact
    "scales": ["float32", "float16"],  # likewise; a run of equal ones is stored once
    "scale_runs": ["int32"],  # lengths of these runs
    "value_scales": ["float32"],  # a value's level stands for (level - zero point) * scale
    "value_zero_points": ["uint8"],
}

IMAGES, PIXELS, LOGITS = "images", "pixels", "logits"
MEANINGS = {
    IMAGES: "float32 (N, C, H, W): pixels / 255, less mean, divided by std, in channel_order",
    PIXELS: "uint8 (N, C, H, W): RGB pixels",
}
OPSET, IR_VERSION = 17, 8  # of 2022
MAX_DIFFERENCE = 0.1  # root mean square of what a check tolerates, in standard deviations of logits


class FileError(ValueError):
    """A file cannot be used; one line for the user."""


class Weights(NamedTuple):
    """Weights of a convolution, a linear layer or an affine operation."""

    levels: np.ndarray  # int8, or float32 weights if the layer is not quantized
    bias: np.ndarray  # float32, of each output channel
    scales: np.ndarray | None = None  # float32, real value of a level in each output channel


class Network(NamedTuple):
    """A network in plain numbers; an FP32 network has no ranges."""

    operations: Sequence[Mapping[str, Any]]  # in execution order, from the input to the logits
    weights: Mapping[str, Weights]  # by the operation's name
    ranges: Mapping[str, tuple[float, int]] = {}  # scale and zero point of each uint8 value
    facts: Mapping[str, Any] = {}  # any JSON values: classes, mean, std, channel_order, resize, ...


# --- the file -------------------------------------------------------------------------------------


def read_tensors(content: bytes, mark: str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file that bears a mark, if its checksum is right."""
    tensors = load_tensors(content)
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end]).get("__metadata__", {})
    version, digits = metadata.get("version", "")[:20], metadata.get("sha256", "").encode()
    _require(metadata.get("format") == mark, "without its mark")
    _require(version == VERSION, f"version {version} is not known here")
    unsigned = content[:end].replace(digits, b"0" * 64, 1)
    found = hashlib.sha256(unsigned + content[end:]).hexdigest().encode()
    _require(found == digits, "checksum differs")
    return tensors


def parse(content: bytes) -> Network:
    """Return the network of a file's content; raise any Exception if it is damaged or no network.

    Memory is bounded by the content's size. Whether the operations fit together is not checked.
    """
    tensors = read_tensors(content, MARK)
    unknown = tensors.keys() - TENSORS
    _require(not unknown, f"{min(unknown, default='')[:60]} is unexpected")
    for name, types in TENSORS.items():
        values = tensors.setdefault(name, np.empty(0, types[0]))
        is_fit = values.ndim == 1 and values.dtype.name in types
        _require(is_fit, f"{name} has another shape or type")
        _require(np.isfinite(values).all(), f"{name} holds NaN or infinite values")
        _require("scale" not in name or (values > 0).all(), f"{name} are not positive")
    fields = _unpack(tensors["network"])
    graph, stored = fields.pop("graph"), fields.pop("weights")
    outputs = [shape[0] for _, shape in stored]
    runs = tensors["scale_runs"]
    is_fit = len(tensors["scales"]) == len(runs) and runs.sum(dtype=np.int64) == sum(outputs)
    _require(is_fit, "scales are not as many as output channels")
    fp32_sizes = [math.prod(shape) for storage, shape in stored if storage == "fp32"]
    fp32 = iter(_split(tensors["fp32"].copy(), fp32_sizes, "fp32"))
    coded = [layer for layer in stored if layer[0] != "fp32"]
    levels = iter(decode_levels(tensors["levels"], coded))
    weights = {}
    for name, (storage, shape), bias, scales in zip(
        [o["name"] for o in graph if o["kind"] in ("convolution", "linear", "affine")],
        stored,
        _split(tensors["biases"].astype(np.float32), outputs, "biases"),
        _split(np.repeat(tensors["scales"].astype(np.float32), runs), outputs, "scales"),
        strict=True,
    ):
        if storage == "fp32":
            weights[name] = Weights(next(fp32).reshape(shape), bias)
        else:
            weights[name] = Weights(next(levels).reshape(shape), bias, scales)
    pairs = zip(tensors["value_scales"], tensors["value_zero_points"], strict=True)
    pairs = [(float(scale), int(zero_point)) for scale, zero_point in pairs]
    indices = zip(graph, fields.pop("ranges"), strict=True)
    ranges = {o["name"]: pairs[index] for o, index in indices if index is not None}
    return Network(graph, weights, ranges, fields)


def _unpack(packed: np.ndarray) -> dict:
    """Return the zlib-compressed JSON of a file, checked for what its readers rely on.

    ``graph`` lists the operations in execution order; ``weights`` how the weight of each layer and
    affine operation is stored (``sparse``, ``dense`` or ``fp32``) and its shape; ``ranges`` the
    index of each operation's scale and zero point, or null where its value is not quantized. The
    rest are facts.
    """
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(packed.tobytes(), MAX_JSON_BYTES)
    _require(unpacker.eof, "its description is cut off or too long")
    fields = json.loads(text)
    graph, mean, std = fields["graph"], fields["mean"], fields["std"]
    _require(0 < len(graph) <= MAX_OPERATIONS, "too many operations, or none")
    _require(len({o["name"] for o in graph}) == len(graph), "two operations have one name")
    for operation in graph:
        for key in SIZES & operation.keys():
            _check_sizes(operation[key], least=0 if key == "padding" else 1)
    for storage, shape in fields["weights"]:
        _check_sizes(shape)
        _require(storage in ("sparse", "dense", "fp32"), "weights stored in an unknown way")
    _check_sizes(fields["resize"] or 1)
    is_fit = all(isinstance(name, str) for name in fields["classes"])
    _require(is_fit, "class names that are no text")
    is_fit = all(isinstance(value, float) and math.isfinite(value) for value in (*mean, *std))
    _require(is_fit, "mean or std that is no number")
    _require(min(std) > 0, "a std that is not positive")
    is_fit = len(mean) == len(std) == graph[0]["shape"][0]
    _require(is_fit, "another number of channels than mean and std have")
    _require(fields["channel_order"] in ("rgb", "bgr"), "an unknown order of channels")
    return fields


def _check_sizes(value: object, least: int = 1) -> None:
    for size in value if isinstance(value, list) else [value]:
        is_fit = type(size) is int and least <= size < MAX_SIZE
        _require(is_fit, "a size that is no positive number, or far too large")


def _require(is_fit: bool, reason: str) -> None:
    if not is_fit:
        raise ValueError(reason)


def _split(values: np.ndarray, counts: Sequence[int], name: str) -> list[np.ndarray]:
    _require(len(values) == sum(counts), f"{name} has another shape")
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
ACTIVITIES, GROUPS = 32, 4  # contexts of whether a weight is zero; groups of these for its bits
LEAN = 4  # how far neighbours' signs can point one way
BITS = 8  # of a level's magnitude, at most
SIGNS, LENGTHS, LOWER_BITS, CONTEXTS = 32, 41, 73, 81  # where the other contexts begin, and the end
EVIDENCE = 4  # how active a weight's output channel, its input channel and its kernel are, and a 1
UNIT = 32  # of the evidence's weights
ADJACENT, APART = 3, 1  # how much a neighbour in the kernel says
# A byte is a step on the scale of odds, from 2^-12 to 2^12; probabilities are rounded to 16 bits.
PROBABILITIES = np.round(65536 / (1 + 2.0 ** ((128 - np.arange(256)) * 12 / 128))) / 65536
BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)
EIGHTHS = 2 ** (np.arange(8) / 8 - 1)  # of an octave, from 1/2 on

Context = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
Code = Callable[[np.ndarray, np.ndarray], np.ndarray]


def decode_levels(
    stream: np.ndarray, stored: Sequence[tuple[str, Sequence[int]]]
) -> list[np.ndarray]:
    """Return the levels of layers (int8), each (outputs, inputs per group, positions of a kernel).

    ``stored`` says of each layer ``dense`` or ``sparse``, and its shape. The stream (uint8) holds
    the tables of all layers, then a range coder's words (uint32). A table is the frequency of each
    level (uint16) of a dense layer; of a sparse one the weights of the evidence (int8) and the
    probability of each context (uint8).
    """
    shapes = [(shape[0], shape[1], math.prod(shape[2:])) for _, shape in stored]
    sizes = [2 * LEVELS if storage == "dense" else EVIDENCE + CONTEXTS for storage, _ in stored]
    head, weights = sum(sizes), sum(map(math.prod, shapes))
    is_whole = len(stream) >= head and (len(stream) - head) % 4 == 0
    is_likely = weights <= max(FEW_WEIGHTS, 8 * len(stream) / MIN_BITS)
    _require(is_whole and is_likely, "the coded levels are cut off")
    _require(all(shape[2] <= MAX_KERNEL for shape in shapes), "too large a kernel")
    words = np.frombuffer(stream[head:].tobytes(), "<u4").astype(np.uint32)
    decoder, layers = constriction.stream.queue.RangeDecoder(words), []
    for shape, table in zip(shapes, _split(stream[:head], sizes, "levels"), strict=True):
        if len(table) == 2 * LEVELS:
            symbols = decoder.decode(dense_model(table.view("<u2")), math.prod(shape))
            layers.append((symbols + LOWEST).astype(np.int8).reshape(shape))
        else:
            layers.append(np.zeros(shape, np.int8))
            context, p = weigher(table[:EVIDENCE].view(np.int8)), PROBABILITIES[table[EVIDENCE:]]
            read = lambda contexts, _, p=p: decoder.decode(BERNOULLI, p[contexts]) > 0  # noqa: E731
            code_layer(layers[-1], context, read)
    is_read = not layers or decoder.maybe_exhausted()
    _require(is_read, "there are more coded levels than the network has")
    return layers


def dense_model(table: np.ndarray) -> object:
    """Return the coder's model of levels' frequencies; exact, so equal on every machine."""
    _require(table.any(), "a layer without levels")
    shares = (table.astype(np.float64) / table.sum(dtype=np.int64)).astype(np.float32)
    return constriction.stream.model.Categorical(shares, perfect=False)


def weigher(weights: np.ndarray) -> Context:
    """Return what gives each weight's context of whether it is zero, from weighed evidence."""

    def context(evidence: Sequence[np.ndarray], nonzero: np.ndarray) -> np.ndarray:
        score = sum(int(w) * part for w, part in zip(weights, evidence, strict=True)) // UNIT
        return np.clip(score.reshape(-1) + ACTIVITIES // 2, 0, ACTIVITIES - 1)

    return context


def code_layer(levels: np.ndarray, context: Context, code: Code) -> None:
    """Pass the levels (int8, (outputs, inputs, positions)) by a coder; a decoder fills them in.

    ``context`` returns contexts of zeros (int64, flat) from the evidence, which broadcasts to
    (outputs, inputs), and from which weights are not zero, as an encoder knows. ``code`` returns
    flags (bool) from their contexts and, as an encoder knows, from these flags.
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
            evidence = (rows[:, None], columns, KERNEL_LOGS[beside[position]], np.int64(UNIT))
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
    y, x = np.divmod(np.arange(positions), 3 if positions == 9 else positions)
    away = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    near = np.where((away == 1) & (positions == 9), ADJACENT, APART) * (away > 0)
    return near.astype(np.int16)


def log2_eighths(numbers: np.ndarray | int) -> np.ndarray:
    """Return floor(8 log2 n), exactly, of numbers of at least 1 (int64)."""
    fractions, exponents = np.frexp(numbers)  # n = fraction * 2^exponent, 1/2 <= fraction < 1
    return 8 * (exponents - 1) + np.searchsorted(EIGHTHS, fractions, side="right") - 1


KERNEL_LOGS = log2_eighths(2 * np.arange(2 * MAX_KERNEL) + 1)


def _density(nonzero: np.ndarray, coded: int) -> np.ndarray:
    """Return the logarithm of each channel's share of nonzero weights; at first of an eighth."""
    return log2_eighths(2 * nonzero + 2) - log2_eighths(2 * coded + 16)


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
        open_ = open_[code(group[open_] + length - 1, given[open_] >> length > 0)]
        lengths[open_] += 1
    for bit in range(1, BITS):  # the first after the leading one, and so on
        (longer,) = (lengths > bit).nonzero()
        ones = given[longer] >> (lengths[longer] - 1 - bit) & 1 > 0
        ones = code(np.full(len(longer), LOWER_BITS + bit), ones)
        magnitudes[longer] = magnitudes[longer] << 1 | ones
    levels[kept] = np.where(negative, -magnitudes, magnitudes)
    return levels.astype(np.int8).reshape(values.shape)


# --- ONNX -----------------------------------------------------------------------------------------
#
# ONNX describes quantization by FP32 operators between QuantizeLinear and DequantizeLinear nodes;
# runtimes merge each group into one INT8 kernel. Weights are stored in INT8, biases in INT32.


OPERATORS = {  # kinds of operations that are one node in ONNX
    "convolution": "Conv", "linear": "Gemm", "add": "Add", "multiply": "Mul",
    "concatenate": "Concat", "max_pool": "MaxPool", "average_pool": "AveragePool",
    "flatten": "Flatten", "permute": "Transpose", "relu": "Relu", "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid", "sigmoid": "Sigmoid",
}  # fmt: skip
FIXED = {  # attributes that these always have
    "linear": {"transB": 1}, "concatenate": {"axis": 1}, "hardsigmoid": {"alpha": 1 / 6},
}  # fmt: skip
ATTRIBUTES = {  # ONNX's names for an operation's numbers
    "stride": "strides", "dilation": "dilations", "groups": "group", "kernel": "kernel_shape",
    "ceil": "ceil_mode", "count_padding": "count_include_pad", "order": "perm",
}  # fmt: skip


class _Builder:
    """Collects the nodes and constants of a graph; each method returns the name of a value."""

    def __init__(self):
        self.nodes, self.constants, self.name = [], [], ""  # of the operation that comes next

    def add(self, operator: str, inputs: Sequence[str | np.ndarray], **attributes: object) -> str:
        """Add a node, with constants for arrays among its inputs."""
        from onnx import helper, numpy_helper

        output, names = f"{self.name}/{operator}_{len(self.nodes)}", list(inputs)
        for index, value in enumerate(inputs):
            if not isinstance(value, str):
                names[index] = f"{output}/{index}"
                self.constants.append(numpy_helper.from_array(np.asarray(value), names[index]))
        self.nodes.append(helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def dequantize(self, levels: np.ndarray, scales: np.ndarray) -> str:
        """Add levels whose first dimension has a scale each."""
        zeros = np.zeros_like(scales, levels.dtype)
        return self.add("DequantizeLinear", [levels, scales, zeros], axis=0)

    def round(self, value: str, scale: float, zero_point: int) -> str:
        """Round a value to uint8 levels and back."""
        parameters = [np.float32(scale), np.uint8(zero_point)]
        levels = self.add("QuantizeLinear", [value, *parameters])
        return self.add("DequantizeLinear", [levels, *parameters])

    def weights(self, network: Network, name: str, source: str) -> list[str | np.ndarray]:
        """Return the weight and bias of a layer that reads ``source``, as inputs of a node."""
        levels, bias, scales = network.weights[name]
        if scales is None:
            return [levels, bias]
        steps = np.float32(network.ranges[source][0]) * scales
        rounded = np.rint(bias.astype(np.float64) / steps)
        if np.abs(rounded).max() < 2**31:  # else a channel's weights are next to nothing
            bias = self.dequantize(rounded.astype(np.int32), steps)
        return [self.dequantize(levels, scales), bias]

    def normalize(self, facts: Mapping[str, Any]) -> str:
        """Turn uint8 RGB pixels into the network's images."""
        value = self.add("Cast", [PIXELS], to=1)
        mean, std = (np.float32(facts[key])[:, None, None] for key in ("mean", "std"))
        for operator, by in (("Div", np.float32(255)), ("Sub", mean), ("Div", std)):
            value = self.add(operator, [value, by])
        if facts["channel_order"] == "bgr":
            value = self.add("Gather", [value, np.array([2, 1, 0])], axis=1)
        return value


def window_means(old: int, new: int) -> np.ndarray:
    """Return the matrix that averages ``old`` numbers in ``new`` windows, as torch lays them."""
    _require(old * new <= MAX_SIZE, "far too large windows")
    window, index = np.arange(new)[:, None], np.arange(old)
    inside = (index >= window * old // new) & (index < -(-(window + 1) * old // new))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _add_operation(add: Callable, x: list[str | np.ndarray], o: Mapping[str, Any]) -> str:
    """Add the nodes of an operation ``o`` on its inputs ``x``, its weight and bias included."""
    if o["kind"] in OPERATORS:
        attributes = {new: o[old] for old, new in ATTRIBUTES.items() if old in o}
        if "padding" in o:
            attributes["pads"] = o["padding"] * 2
        return add(OPERATORS[o["kind"]], x, **attributes, **FIXED.get(o["kind"], {}))
    match o["kind"]:
        case "affine":  # a batch norm of mean 0 and variance 1
            moments = [np.zeros_like(x[1]), np.ones_like(x[1])]
            return add("BatchNormalization", [*x, *moments], epsilon=0.0)
        case "adaptive_average_pool":  # a product with a matrix of means in each direction
            rows, columns = map(window_means, o["source_size"], o["size"])
            return add("MatMul", [rows, add("MatMul", [*x, columns.T])])
        case "global_average_pool":
            pooled = add("GlobalAveragePool", x)
            return pooled if o["keep"] else add("Flatten", [pooled])
        case "reshape":
            return add("Reshape", [*x, np.array([-1, *o["shape"]])])
        case "slice":
            dimensions, starts, ends, steps = np.array(o["parts"]).T
            return add("Slice", [*x, starts, ends, dimensions, steps])
        case "pad":  # torch gives both ends of the last dimension first
            ends = np.reshape(o["padding"], (-1, 2))[::-1]
            return add("Pad", [*x, np.pad(ends, ((4 - len(ends), 0), (0, 0))).T.ravel()])
        case "relu6":
            return add("Clip", [*x, np.float32(0), np.float32(6)])
        case "silu":
            return add("Mul", [*x, add("Sigmoid", x)])
    raise ValueError(f"{o['kind']} is not known here")


def to_onnx(network: Network, pixels: bool = False) -> bytes:
    """Return the content of an ONNX file that takes ``pixels`` or ``images``; see ``MEANINGS``.

    The network's facts are its metadata, as JSON. If the operations do not fit together, or their
    values are far too large, some Exception is raised.
    """
    import onnx
    from onnx import TensorProto, helper

    builder, facts, values = _Builder(), network.facts, {}
    taken, dtype = (PIXELS, TensorProto.UINT8) if pixels else (IMAGES, TensorProto.FLOAT)
    value = builder.normalize(facts) if pixels else IMAGES
    for o in network.operations:
        name = builder.name = o["name"]
        if values:  # the first is the input
            inputs = [values[source] for source in o["inputs"]]
            if name in network.weights:
                inputs += builder.weights(network, name, o["inputs"][0])
            value = _add_operation(builder.add, inputs, o)
        if name in network.ranges:
            value = builder.round(value, *network.ranges[name])
        values[name] = value
    builder.nodes.append(helper.make_node("Identity", [value], [LOGITS]))
    shape, classes = network.operations[0]["shape"], len(facts.get("classes", ())) or "classes"
    images = helper.make_tensor_value_info(taken, dtype, ["N", *shape])
    logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", classes])
    graph = helper.make_graph(builder.nodes, "network", [images], [logits], builder.constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    told = {"input": MEANINGS[taken], **facts}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in told.items()})
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = [value.type.tensor_type.shape.dim for value in inferred.graph.value_info]
    size = sum(math.prod(max(d.dim_value, 1) for d in shape) for shape in shapes)
    _require(size <= MAX_ONNX_VALUES, "values too large")
    return model.SerializeToString()


# --- running --------------------------------------------------------------------------------------


class Classifier(NamedTuple):
    """A network in ONNX Runtime: uint8 RGB pixels (N, C, H, W) to float32 logits (N, classes)."""

    session: Any  # an ``onnxruntime.InferenceSession``
    shape: tuple[int, int, int]  # channels, height and width of an image
    facts: Mapping[str, Any]  # of the file; resize is the short side before cutting, or null

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits of images."""
        shape = f"(N, {', '.join(map(str, self.shape))})"
        is_fit = pixels.dtype == np.uint8 and pixels.shape[1:] == self.shape
        _require(is_fit, f"uint8 images of shape {shape} wanted")
        return self.session.run(None, {PIXELS: pixels})[0]


def load(path: str | Path, threads: int = 0) -> Classifier:
    """Return a file's network, by default on all cores; a FileError if it is damaged or none."""
    with _reading(path) as content:
        network = parse(content)
        session = start_session(to_onnx(network, pixels=True), threads)
        classify = Classifier(session, tuple(network.operations[0]["shape"]), network.facts)
        logits = classify(np.zeros((1, *classify.shape), np.uint8))
        is_fit = logits.shape == (1, len(network.facts["classes"]))
        _require(is_fit, "another number of logits than of classes")
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


@contextlib.contextmanager
def _reading(path: str | Path, problem: str = "damaged or no INT8 network") -> Iterator[bytes]:
    """Yield a file's content; raise FileError for whatever a damaged one causes meanwhile."""
    file = Path(path)
    if not file.is_file():  # to open a named pipe would be to wait for its writer
        raise FileError(f"{path}: {'not a regular' if file.exists() else 'no such'} file")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise FileError(f"{path}: too large")
    content = file.read_bytes()
    try:
        yield content
    except ImportError:  # a package is missing
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise FileError(f"{path}: {problem} ({reason})") from None


def check(classify: Classifier, path: str | Path) -> tuple[int, int, float]:
    """Compare logits with those that ``--write-check`` wrote, or raise a FileError.

    Return the numbers of images and of those of the same class, and the root mean square of the
    differences, in standard deviations of the logits.
    """
    with _reading(path, "not a check of this network") as content:
        tensors = read_tensors(content, CHECK_MARK)
        expected, logits = tensors["logits"], classify(tensors["pixels"])
        same = int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
        difference = np.sqrt(np.square(logits - expected).mean()) / expected.std()
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
    passed = True
    try:
        if args.model:
            with _reading(args.file) as content:
                model = to_onnx(parse(content), args.input == PIXELS)
            Path(args.model).write_bytes(model)
            print(f"{args.model}: {len(model):,} bytes, takes {args.input}")
        if args.check:
            images, same, difference = check(load(args.file), args.check)
            passed = difference <= MAX_DIFFERENCE
            print(
                f"{'passed' if passed else 'failed'}: {same} of {images} images get the expected "
                f"class; logits differ by {difference:.3f} standard deviations "
                f"(up to {MAX_DIFFERENCE} is rounding)"
                + ("" if passed else ": another network, or images prepared in another way")
            )
    except (FileError, ImportError, OSError) as error:
        is_file = isinstance(error, OSError)
        reason = f"{error.filename}: {error.strerror}" if is_file else error
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
