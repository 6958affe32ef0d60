"""The calibrated INT8 model as ONNX, with the scales and zero points that torch runs with.

The file holds ordinary FP32 operators between QuantizeLinear and DequantizeLinear nodes (Q/DQ), as
ONNX describes quantization (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html); runtimes
merge each group into one INT8 kernel. Weights are stored in INT8 by output channel, biases in INT32
with the scale of the products that they are added to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node

from common.command.cli import UserError
from common.files.atomic import replace_file
from common.images.cifar10 import IMAGE_SIZE

OPSET = 17  # of 2022: per-channel DequantizeLinear came with 13
IR_VERSION = 8
INT32_MAX = 2**31 - 1


def require_packages() -> None:
    """Check that the optional packages are there, before any long work.

    Raises:
        UserError: onnx or onnxruntime is missing; says how to install both.
    """
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--export-onnx needs {' and '.join(missing)}: pip install onnx onnxruntime"
        )


def export_onnx(model: GraphModule, path: Path) -> None:
    """Write what ``convert`` returned to a file that onnx has checked.

    Its input is ``images`` (normalised, float32; the batch size is free), its output ``logits``.
    """
    import onnx

    proto = _Exporter(model).build()
    onnx.checker.check_model(proto, full_check=True)
    replace_file(path, lambda file: file.write(proto.SerializeToString()))


def load_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load an ONNX file into ONNX Runtime on the CPU, at as many threads as torch has.

    Returns:
        Maps normalised images (float32, (N, 3, 32, 32)) to logits (float32, (N, 10)).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would take the cores from whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        # It would quantize layers that were left in FP32 between INT8 ones.
        disabled_optimizers=["WeightBiasQuantization"],
    )
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


class _Exporter:
    """Walks a converted graph; every value is known by the name of its FP32 form in ONNX."""

    def __init__(self, model: GraphModule):
        self._model = model
        self._nodes, self._initializers = [], []
        self._names: dict[Node, str] = {}
        # Scale of the INT8 values behind a name: biases and pooling depend on their input's.
        self._scales: dict[str, tuple[float, int]] = {}

    def build(self) -> object:
        """Return the ``onnx.ModelProto``."""
        from onnx import TensorProto, helper

        for node in self._model.graph.nodes:
            if node.op == "output":
                self._add("Identity", [self._names[node.args[0]]], "logits")
            elif node.op != "get_attr":  # scales and zero points: read where they are used
                self._names[node] = self._convert(node)
        classes = self._model.get_submodule("linear").out_features
        images, logits = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
            for name, shape in (("images", (3, IMAGE_SIZE, IMAGE_SIZE)), ("logits", (classes,)))
        )
        graph = helper.make_graph(
            self._nodes, "resnet18_cifar10_int8", [images], [logits], self._initializers
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="quantization.py"
        )

    def _convert(self, node: Node) -> str:
        inputs = [self._names[arg] for arg in node.args if arg in self._names]
        if node.op == "placeholder":
            return "images"
        if node.op == "call_method":  # dequantize: names stand for FP32 values already
            return inputs[0]
        if node.op == "call_module":
            return self._convert_module(node, self._model.get_submodule(node.target), inputs)
        if node.target is torch.quantize_per_tensor:
            return self._quantize(inputs[0], node.name, *map(self._constant, node.args[1:3]))
        if node.target is torch.flatten:
            flat = self._add("Flatten", inputs, f"{node.name}_fp32", axis=1)
            return self._quantize(flat, node.name, *self._scales[inputs[0]])
        if "quantized.add" in str(node.target):
            total = self._add("Add", inputs, f"{node.name}_sum")
            if "relu" in str(node.target):
                total = self._add("Relu", [total], f"{node.name}_relu")
            return self._quantize(total, node.name, *map(self._constant, node.args[2:4]))
        raise NotImplementedError(f"no ONNX form of {node.target}")

    def _convert_module(self, node: Node, module: nn.Module, inputs: list[str]) -> str:
        """Convert a layer with the ReLU that is fused into it, in INT8 or left in FP32."""
        kind = module._get_name()
        if kind == "AdaptiveAvgPool2d":
            mean = self._add("GlobalAveragePool", inputs, f"{node.name}_fp32")
            return self._quantize(mean, node.name, *self._scales[inputs[0]])
        is_int8 = kind.startswith("Quantized")
        layer = module if is_int8 or isinstance(module, nn.Conv2d | nn.Linear) else module[0]
        weight_and_bias = self._weight_and_bias(node.name, layer, is_int8, inputs[0])
        operands, name = [inputs[0], *weight_and_bias], f"{node.name}_fp32"
        if "Linear" in kind:
            value = self._add("Gemm", operands, name, transB=1)
        else:
            pads = [*layer.padding, *layer.padding]
            value = self._add("Conv", operands, name, strides=list(layer.stride), pads=pads)
        if "ReLU" in kind:
            value = self._add("Relu", [value], f"{node.name}_relu")
        return self._quantize(value, node.name, layer.scale, layer.zero_point) if is_int8 else value

    def _weight_and_bias(
        self, name: str, layer: nn.Module, is_int8: bool, source: str
    ) -> tuple[str, str]:
        weight_name, bias_name = f"{name}_weight", f"{name}_bias"
        if not is_int8:
            self._constant_tensor(weight_name, layer.weight.detach().numpy())
            return weight_name, self._constant_tensor(bias_name, layer.bias.detach().numpy())
        weight, bias = layer.weight(), layer.bias().detach().numpy()
        scales = weight.q_per_channel_scales().numpy().astype(np.float32)
        self._dequantize(weight_name, weight.int_repr().numpy(), scales)
        bias_scales = np.float32(self._scales[source][0]) * scales
        bias_levels = np.rint(bias.astype(np.float64) / bias_scales)
        if np.abs(bias_levels).max() > INT32_MAX:  # weights of a dead channel: scale near zero
            return weight_name, self._constant_tensor(bias_name, bias)
        return weight_name, self._dequantize(bias_name, bias_levels.astype(np.int32), bias_scales)

    def _quantize(self, value: str, name: str, scale: float, zero_point: int) -> str:
        """Add a QuantizeLinear and a DequantizeLinear; return the name of the FP32 result."""
        parameters = [
            self._constant_tensor(f"{name}_scale", np.float32(scale)),
            self._constant_tensor(f"{name}_zero_point", np.uint8(zero_point)),
        ]
        levels = self._add("QuantizeLinear", [value, *parameters], f"{name}_uint8")
        result = self._add("DequantizeLinear", [levels, *parameters], name)
        self._scales[result] = (scale, zero_point)
        return result

    def _dequantize(self, name: str, levels: np.ndarray, scales: np.ndarray) -> str:
        zero_points = np.zeros(len(scales), levels.dtype)
        operands = {"levels": levels, "scale": scales, "zero_point": zero_points}
        names = [self._constant_tensor(f"{name}_{key}", value) for key, value in operands.items()]
        return self._add("DequantizeLinear", names, name, axis=0)

    def _constant(self, node: Node | float) -> float | int:
        """Return the number behind a graph's argument: a buffer's value or the number itself."""
        return getattr(self._model, node.target).item() if isinstance(node, Node) else node

    def _constant_tensor(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self._initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output
