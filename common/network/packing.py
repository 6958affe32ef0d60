"""FP32 convolutions with their weights packed once, for inference on an x86 CPU.

oneDNN wants the weight of a convolution in a blocked layout. torch keeps the plain layout and
reorders the weight at every call, which takes a third of the time at batch 1. INT8 kernels pack
their weights once, so FP32 is a fair baseline only if it does the same.
"""

from __future__ import annotations

import operator
import platform

import torch
import torch.nn.functional as F
from torch import fx, nn

# Activations that can run inside a convolution: oneDNN's name and its scalars.
RELU = ("relu", [])
ACTIVATIONS = {nn.ReLU: RELU, F.relu: RELU, torch.relu: RELU, "relu": RELU, "relu_": RELU,
               nn.ReLU6: ("hardtanh", [0.0, 6.0])}  # fmt: skip
ADDITIONS = (operator.add, torch.add)  # torch.fx traces `a += b` as `a + b`


def can_pack() -> bool:
    """Return whether torch has oneDNN's packed convolutions on this CPU."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


@torch.inference_mode(False)
@torch.no_grad()
def pack_convolutions(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Return the same function with packed weights; activations and additions are fused.

    The result takes any batch size. It is for inference, not for saving, and shares with
    ``model`` the parameters of all other layers.

    Args:
        model: FP32 network in eval mode, on the CPU, in channels_last; left as it is. ``torch.fx``
            must be able to trace it.
        example: Input with the usual height and width (float32, channels_last). The layout of a
            weight depends on them: other sizes give the same results, but may take longer.
    """
    packed = fx.symbolic_trace(model)
    _drop_identities(packed)
    _LayoutRecorder(packed).run(example)
    for node in list(packed.graph.nodes):
        if _is_packable(_called_module(node)):
            _pack(node)
    for node in list(packed.graph.nodes):
        if node.target in ADDITIONS:
            _fuse_addition(node)
    for node in list(packed.graph.nodes):
        _fuse_activation(node)
    packed.delete_all_unused_submodules()
    packed.recompile()
    return packed


class _LayoutRecorder(fx.Interpreter):
    """Notes the shape and strides of every tensor in its node's ``meta["layout"]``."""

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            node.meta["layout"] = (value.shape, value.stride())
        return value


def _called_module(node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return node.graph.owning_module.get_submodule(node.target)


def _drop_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if isinstance(_called_module(node), nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def _is_packable(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
    )


def _pack(node: fx.Node) -> None:
    """Replace a convolution by a call of the kernel that takes a packed weight."""
    layer, (image,) = _called_module(node), node.all_input_nodes
    geometry = [*map(list, (layer.padding, layer.stride, layer.dilation)), layer.groups]
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        layer.weight.detach().to_mkldnn(), *geometry, list(image.meta["layout"][0])
    )
    bias = None if layer.bias is None else layer.bias.detach()
    owner, operands = node.graph.owning_module, []
    with node.graph.inserting_before(node):
        for name, tensor in ((f"{node.name}_weight", weight), (f"{node.name}_bias", bias)):
            if tensor is not None:
                owner.register_buffer(name, tensor, persistent=False)
            operands.append(None if tensor is None else node.graph.get_attr(name))
        call = node.graph.call_function(
            torch.ops.mkldnn._convolution_pointwise.default,
            (image, *operands, *geometry, "none", [], ""),
        )
    _replace(node, call)


def _fuse_addition(node: fx.Node) -> None:
    """Let the convolution right before an addition compute it too, where both have one layout."""
    convolution = node.prev
    if (
        convolution.target is not torch.ops.mkldnn._convolution_pointwise.default
        or len(convolution.users) != 1
        or convolution not in node.args
        or len(node.all_input_nodes) != 2
        or node.kwargs
    ):
        return
    (other,) = (operand for operand in node.all_input_nodes if operand is not convolution)
    if other.meta.get("layout") != convolution.meta["layout"]:
        return
    image, *operands = convolution.args[:-3]
    with node.graph.inserting_before(node):
        call = node.graph.call_function(
            torch.ops.mkldnn._convolution_pointwise.binary,
            (image, other, *operands, "add", 1.0, None, [], ""),
        )
    _replace(node, call)
    node.graph.erase_node(convolution)


def _fuse_activation(node: fx.Node) -> None:
    """Let a packed convolution compute an activation, if nothing else reads its result."""
    kernels = torch.ops.mkldnn._convolution_pointwise
    if node.target not in (kernels.default, kernels.binary) or len(node.users) != 1:
        return
    (user,) = node.users
    module = _called_module(user)
    name, scalars = ACTIVATIONS.get(user.target if module is None else type(module), (None, None))
    if name is None or (node.target is kernels.binary and name != "relu"):
        return
    node.args = (*node.args[:-3], name, scalars, "")
    user.replace_all_uses_with(node)
    node.graph.erase_node(user)


def _replace(node: fx.Node, call: fx.Node) -> None:
    call.meta = node.meta
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
