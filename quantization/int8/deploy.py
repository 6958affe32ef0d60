"""The INT8 model in the form with the least work a call: kernels in a row, fused, then frozen.

``convert_fx`` leaves a tree of modules: at batch 1 a quarter of the time goes to Python's calls
through it, and every residual block writes the sum of its branches in a pass of its own. Here the
modules become plain calls of their kernels with constant scales, and on the onednn engine the
addition and its ReLU run inside the convolution before them. Where TorchScript is supported the
result can be frozen, into a file that runs without this project, from C++ too. On the engines that
call oneDNN there is one such model for each of the first few batch sizes.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from common.command.cli import log
from common.images.cifar10 import IMAGE_SIZE
from common.network import packing
from common.network.resnet import ResNet18, fold_batch_norm
from quantization.int8.engines import quiet_torch, running_on
from quantization.settings import Settings

# torch.jit is not supported from Python 3.14 on; the flat model is as fast, but needs Python.
CAN_FREEZE = sys.version_info < (3, 14)
# x86 calls oneDNN or fbgemm, whichever torch takes to be faster for a layer.
ONEDNN_ENGINES = ("x86", "onednn")
MAX_BATCH_SIZES = 8  # to prepare a model for; each takes 22 MB, which TorchScript never frees
PACKING_BATCH_SIZE = 8  # ResNet18 gets the same layouts for every batch size
KERNELS = {
    "QuantizedConv2d": torch.ops.quantized.conv2d.new,
    "QuantizedConvReLU2d": torch.ops.quantized.conv2d_relu.new,
    "QuantizedLinear": torch.ops.quantized.linear.default,
}
FUSED_KERNELS = {
    torch.ops.quantized.add: torch.ops.quantized.conv2d_add.default,
    torch.ops.quantized.add_relu: torch.ops.quantized.conv2d_add_relu.default,
}


@dataclass(frozen=True)
class Quantized:
    """An INT8 model with what was measured of it.

    Attributes:
        settings: How it was made.
        observed: The calibrated model that it was converted from.
        model: The INT8 model.
        deployed: The same in its fastest form, which is what is evaluated and timed.
        predictions: On the images that it was measured on (int64, shape (N,)).
    """

    settings: Settings
    observed: GraphModule
    model: GraphModule
    deployed: nn.Module
    predictions: torch.Tensor


class Deployed(nn.Module):
    """An INT8 model in the form that is fastest in this process, prepared at its first call.

    It runs on its engine, which a call sets in ``torch.backends.quantized``, where it stays:
    additions run on the one that is set, and fused kernels ask for theirs.

    oneDNN's kernels are made for a shape. torch's packed weights keep the one of their first call,
    and make one at every call of another shape: a fifth of the time at batch 1. So on the engines
    that call oneDNN the model is prepared anew for the first ``MAX_BATCH_SIZES`` batch sizes that
    it meets; all others run on the first of these. Several threads may call it.

    Args:
        converted: From :func:`quantization.int8.conversion.convert` for ``engine``; left as it is.
        engine: Its engine.
    """

    def __init__(self, converted: GraphModule, engine: str):
        super().__init__()
        self._engine = engine
        self._prepare = lambda batch_size: freeze(flatten(converted, engine), batch_size, engine)
        self._prepared: dict[int, nn.Module] = {}
        self._has_warned = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (N, 10) of normalised float32 images (N, 3, 32, 32)."""
        model = self._model_for(len(images) if self._engine in ONEDNN_ENGINES else 1)
        with running_on(self._engine):
            return model(images)

    def _model_for(self, batch_size: int) -> nn.Module:
        if batch_size in self._prepared:
            return self._prepared[batch_size]
        if len(self._prepared) < MAX_BATCH_SIZES:
            with quiet_torch(self._engine):  # one thread at a time: see whether it is still needed
                if batch_size not in self._prepared and len(self._prepared) < MAX_BATCH_SIZES:
                    self._prepared[batch_size] = self._prepare(batch_size)
        elif not self._has_warned:
            self._has_warned = True
            log.warning(
                "INT8 %s is prepared for %d batch sizes; batches of %d, or others, are slower",
                self._engine, MAX_BATCH_SIZES, batch_size,
            )  # fmt: skip
        return self._prepared.get(batch_size, next(iter(self._prepared.values())))


def deploy_fp32(model: ResNet18) -> nn.Module:
    """Return FP32 at its best, treated as INT8 is.

    Batch norms are folded, images are channels_last, and oneDNN's weights are packed once. Where
    they cannot be, the model is frozen.

    Args:
        model: Network in eval mode, on the CPU; left as it is.
    """
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
    if packing.can_pack():
        return packing.pack_convolutions(folded, blank_images(PACKING_BATCH_SIZE))
    return freeze(folded)


def flatten(converted: GraphModule, engine: str) -> GraphModule:
    """Return the model as a row of kernel calls; the same function up to one rounding a block.

    On the onednn engine the residual sum is not rounded to INT8 before it is added; those kernels
    also ask for ``torch.backends.quantized.engine`` when they run.

    Args:
        converted: From :func:`quantization.int8.conversion.convert` for ``engine``; left as it is.
        engine: Its engine.
    """
    graph = Graph()
    graph.output(graph.graph_copy(converted.graph, {}))
    flat = GraphModule(converted, graph)  # shares the weights
    with quiet_torch(engine):
        for node in list(flat.graph.nodes):
            if node.op == "call_module":
                _call_kernel(flat, node)
            elif node.op == "get_attr":  # a scale or a zero point
                _inline_constant(flat, node)
        if engine == "onednn":
            for node in list(flat.graph.nodes):
                if node.target in FUSED_KERNELS:
                    _fuse_addition(node)
        flat.delete_all_unused_submodules()
        flat.recompile()
    return flat


def _call_kernel(flat: GraphModule, node: Node) -> None:
    """Replace a call of an INT8 module by one of its kernel; a layer left in FP32 stays."""
    module = flat.get_submodule(node.target)
    kernel = KERNELS.get(module._get_name())
    if kernel is None:
        return
    packed = module._packed_params
    packed = getattr(packed, "_packed_params", packed)  # the linear layer wraps its own
    packed = copy.deepcopy(packed)  # packed anew, with no primitive yet: see Deployed
    name = f"{node.name}_packed"
    setattr(flat, name, packed)
    with flat.graph.inserting_before(node):
        weights = flat.graph.create_node("get_attr", name)
        call = flat.graph.call_function(
            kernel, (node.args[0], weights, module.scale, module.zero_point)
        )
    node.replace_all_uses_with(call)
    flat.graph.erase_node(node)


def _inline_constant(flat: GraphModule, node: Node) -> None:
    constant = getattr(flat, node.target).item()
    for user in list(node.users):
        user.args = tuple(constant if arg is node else arg for arg in user.args)
    flat.graph.erase_node(node)


def _fuse_addition(node: Node) -> None:
    """Let the convolution before an addition compute it too, into the other operand's memory."""
    convolution, residual, scale, zero_point = node.args
    if convolution.target is not KERNELS["QuantizedConv2d"]:
        return  # it was left in FP32
    if any(user > node for user in residual.users):
        raise RuntimeError(f"{residual} is read again after {node} would overwrite it")
    image, weights, _, _ = convolution.args
    with node.graph.inserting_before(node):
        fused = node.graph.call_function(
            FUSED_KERNELS[node.target], (image, residual, weights, scale, zero_point)
        )
    node.replace_all_uses_with(fused)
    node.graph.erase_node(node)
    node.graph.erase_node(convolution)


def freeze(model: nn.Module, batch_size: int = 1, engine: str | None = None) -> nn.Module:
    """Return a frozen TorchScript trace of a model in eval mode, or the model where it cannot be.

    Args:
        model: Maps channels_last images (N, 3, 32, 32) to logits; left as it is.
        batch_size: Of its first call, which is made here; the result takes any.
        engine: That this call is made on; None for the one that is set.
    """
    example = blank_images(batch_size)
    # Tensors made in inference mode could not be saved.
    with quiet_torch(engine), torch.inference_mode(False), torch.no_grad():
        if CAN_FREEZE:
            return torch.jit.freeze(torch.jit.trace(model, example, check_trace=False))
        model(example)
        return model


def blank_images(count: int) -> torch.Tensor:
    """Return float32 zeros (count, 3, 32, 32), channels_last: what a model is traced with."""
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.zeros(shape).to(memory_format=torch.channels_last)
