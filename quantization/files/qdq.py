"""An INT8 network as an ONNX model: FP32 operators between QuantizeLinear and DequantizeLinear.

That is how ONNX describes quantization (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html);
runtimes merge each group into one INT8 kernel. Weights are stored in INT8 by output channel, biases
in INT32 in steps of the products that they are added to.

Only numpy and onnx are used here: a network comes as plain numbers and arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 17  # of 2022: per-channel DequantizeLinear came with 13
IR_VERSION = 8
INT32_MAX = 2**31 - 1
IMAGES, LOGITS = "images", "logits"


@dataclass(frozen=True)
class Weights:
    """Weights of a convolution, a linear layer or an affine operation.

    Attributes:
        levels: int8 levels, or float32 weights of a layer that is not quantized.
        bias: Real bias of each output channel; float32.
        scales: Real value of one level in each output channel; None in FP32.
    """

    levels: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None = None


@dataclass(frozen=True)
class PlainNetwork:
    """A network in plain numbers.

    Attributes:
        operations: Operations in execution order, as :meth:`common.network.graph.Graph.to_json`
            has them; the first is the input, the last gives the logits.
        shapes: Shape of each operation's value for one image.
        weights: Weights by the operation's name.
        ranges: Scale and zero point of each value that is kept in uint8, by the operation's name.
            None at all make an FP32 model.
        facts: Facts to store with the model, such as class names; any JSON values.
    """

    operations: Sequence[Mapping[str, Any]]
    shapes: Mapping[str, Sequence[int]]
    weights: Mapping[str, Weights]
    ranges: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def build_model(network: PlainNetwork) -> ModelProto:
    """Return a network as ONNX.

    Its input is ``images`` (normalised, float32, (N, C, H, W); N is free), its output ``logits``.
    """
    builder = _Builder(network)
    for operation in network.operations:
        builder.add_operation(operation)
    first, last = (network.operations[index]["name"] for index in (0, -1))
    builder.add("Identity", [builder.values[last]], LOGITS)
    images, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *network.shapes[value]])
        for name, value in ((IMAGES, first), (LOGITS, last))
    )
    graph = helper.make_graph(builder.nodes, "network", [images], [logits], builder.initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    facts = {key: json.dumps(value) for key, value in network.facts.items()}
    helper.set_model_props(model, facts)
    return model


class _Builder:
    """Adds operation after operation.

    Attributes:
        nodes: Nodes so far.
        initializers: Constant tensors so far.
        values: For each operation the name of its FP32 value in ONNX.
    """

    def __init__(self, network: PlainNetwork):
        self._network = network
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.values: dict[str, str] = {}

    def add_operation(self, operation: Mapping[str, Any]) -> None:
        """Add an operation and, if its value is kept in uint8, its quantization."""
        name, inputs = operation["name"], [self.values[source] for source in operation["inputs"]]
        value = _FORMS[operation["kind"]](self, operation, inputs)
        if name in self._network.ranges:
            value = self._quantize(value, name)
        self.values[name] = value

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type | None = None) -> str:
        """Add a constant tensor and return its name."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weights(self, operation: Mapping[str, Any]) -> list[str]:
        """Add the weights and biases of a layer and return the names of their FP32 forms."""
        name, source = operation["name"], operation["inputs"][0]
        weights = self._network.weights[name]
        if weights.scales is None:
            return [
                self.constant(f"{name}/weight", weights.levels),
                self.constant(f"{name}/bias", weights.bias),
            ]
        levels = self._dequantize(f"{name}/weight", weights.levels, weights.scales)
        steps = np.float32(self._network.ranges[source][0]) * weights.scales.astype(np.float32)
        bias = np.rint(weights.bias.astype(np.float64) / steps)
        if np.abs(bias).max(initial=0) > INT32_MAX:  # a channel whose weights are next to nothing
            return [levels, self.constant(f"{name}/bias", weights.bias)]
        return [levels, self._dequantize(f"{name}/bias", bias.astype(np.int32), steps)]

    def _quantize(self, value: str, name: str) -> str:
        scale, zero_point = self._network.ranges[name]
        parameters = [
            self.constant(f"{name}/scale", scale, np.float32),
            self.constant(f"{name}/zero_point", zero_point, np.uint8),
        ]
        levels = self.add("QuantizeLinear", [value, *parameters], f"{name}/uint8")
        return self.add("DequantizeLinear", [levels, *parameters], f"{name}/kept")

    def _dequantize(self, name: str, levels: np.ndarray, scales: np.ndarray) -> str:
        operands = {
            "levels": levels,
            "scale": scales.astype(np.float32),
            "zero_point": np.zeros(len(scales), levels.dtype),
        }
        names = [self.constant(f"{name}/{key}", value) for key, value in operands.items()]
        return self.add("DequantizeLinear", names, name, axis=0)

    def input_shape(self, operation: Mapping[str, Any]) -> Sequence[int]:
        """Return the shape of an operation's input for one image."""
        return self._network.shapes[operation["inputs"][0]]


# --- the ONNX form of each kind: adds nodes, returns the name of the value ------------------------

_Form = Callable[[_Builder, Mapping[str, Any], list[str]], str]


def _input(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    return IMAGES


def _convolution(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    return builder.add(
        "Conv", [*inputs, *builder.weights(operation)], operation["name"],
        strides=list(operation["stride"]), pads=list(operation["padding"]) * 2,
        dilations=list(operation["dilation"]), group=operation["groups"],
    )  # fmt: skip


def _linear(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    operands = [*inputs, *builder.weights(operation)]
    return builder.add("Gemm", operands, operation["name"], transB=1)


def _affine(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name, weights = operation["name"], builder.weights(operation)
    channels = builder.input_shape(operation)[0]
    moments = [
        builder.constant(f"{name}/mean", np.zeros(channels), np.float32),
        builder.constant(f"{name}/variance", np.ones(channels), np.float32),
    ]
    return builder.add("BatchNormalization", [*inputs, *weights, *moments], name, epsilon=0.0)


def _max_pool(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    return builder.add(
        "MaxPool", inputs, operation["name"], dilations=list(operation["dilation"]),
        **_window(operation),
    )  # fmt: skip


def _average_pool(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    counts = int(operation["count_padding"])
    name = operation["name"]
    return builder.add("AveragePool", inputs, name, count_include_pad=counts, **_window(operation))


def _window(operation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kernel_shape": list(operation["kernel"]),
        "strides": list(operation["stride"]),
        "pads": list(operation["padding"]) * 2,
        "ceil_mode": int(operation["ceil"]),
    }


def _adaptive_pool(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name, wanted = operation["name"], operation["size"]
    sizes = builder.input_shape(operation)[1:]
    if not any(old % new for old, new in zip(sizes, wanted, strict=True)):
        window = [old // new for old, new in zip(sizes, wanted, strict=True)]
        return builder.add("AveragePool", inputs, name, kernel_shape=window, strides=window)
    # Windows of unequal size: a product with a matrix of means in each direction.
    rows, columns = (_means(*pair) for pair in zip(sizes, wanted, strict=True))
    across = builder.constant(f"{name}/columns", columns.T)
    down = builder.constant(f"{name}/rows", rows)
    return builder.add("MatMul", [down, builder.add("MatMul", [*inputs, across], f"{name}/across")],
                       name)  # fmt: skip


def _means(old: int, new: int) -> np.ndarray:
    """Return the matrix that averages ``old`` numbers in ``new`` windows, as torch lays them."""
    matrix = np.zeros((new, old), np.float32)
    for index in range(new):
        start, stop = index * old // new, -(-(index + 1) * old // new)
        matrix[index, start:stop] = 1 / (stop - start)
    return matrix


def _global_pool(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name = operation["name"]
    if operation["keep"]:
        return builder.add("GlobalAveragePool", inputs, name)
    mean = builder.add("GlobalAveragePool", inputs, f"{name}/mean")
    return builder.add("Flatten", [mean], name, axis=1)


def _reshape(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name = operation["name"]
    shape = builder.constant(f"{name}/shape", [-1, *operation["shape"]], np.int64)
    return builder.add("Reshape", [*inputs, shape], name)


def _slice(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name, parts = operation["name"], np.array(operation["parts"], np.int64)
    axes, starts, ends, steps = parts.T
    operands = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    names = [builder.constant(f"{name}/{key}", value) for key, value in operands.items()]
    return builder.add("Slice", [*inputs, *names], name)


def _pad(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    """Add a Pad node; torch gives both ends of the last dimension first."""
    name, pairs = operation["name"], np.reshape(operation["padding"], (-1, 2))[::-1]
    missing = 1 + len(builder.input_shape(operation)) - len(pairs)
    ends = np.concatenate([np.zeros((missing, 2), np.int64), pairs]).T.ravel()
    return builder.add("Pad", [*inputs, builder.constant(f"{name}/pads", ends, np.int64)], name)


def _relu6(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name = operation["name"]
    limits = [
        builder.constant(f"{name}/low", 0, np.float32),
        builder.constant(f"{name}/high", 6, np.float32),
    ]
    return builder.add("Clip", [*inputs, *limits], name)


def _silu(builder: _Builder, operation: Mapping[str, Any], inputs: list[str]) -> str:
    name = operation["name"]
    return builder.add("Mul", [*inputs, builder.add("Sigmoid", inputs, f"{name}/gate")], name)


def _node(kind: str, **attributes: object) -> _Form:
    """Return the form of an operation that one ONNX operator computes."""
    return lambda builder, operation, inputs: builder.add(
        kind, inputs, operation["name"], **attributes
    )


_FORMS: dict[str, _Form] = {
    "input": _input,
    "convolution": _convolution,
    "linear": _linear,
    "affine": _affine,
    "add": _node("Add"),
    "multiply": _node("Mul"),
    "concatenate": _node("Concat", axis=1),
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "adaptive_average_pool": _adaptive_pool,
    "global_average_pool": _global_pool,
    "flatten": _node("Flatten", axis=1),
    "reshape": _reshape,
    "permute": lambda builder, operation, inputs: builder.add(
        "Transpose", inputs, operation["name"], perm=list(operation["order"])
    ),
    "slice": _slice,
    "pad": _pad,
    "relu": _node("Relu"),
    "relu6": _relu6,
    "hardswish": _node("HardSwish"),
    "hardsigmoid": _node("HardSigmoid", alpha=1 / 6, beta=0.5),
    "sigmoid": _node("Sigmoid"),
    "silu": _silu,
}
