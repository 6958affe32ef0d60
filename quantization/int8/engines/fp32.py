"""FP32 at its best, for a fair comparison: layers fused, weights packed once.

oneDNN wants the weight of a convolution in a layout of its own. torch keeps the plain one and
reorders the weight at every call, which takes up to half of the time at batch 1. INT8 kernels pack
their weights once, so FP32 must do the same to be a fair baseline. The layout depends on the number
of images: in one made for eight, a 1×1 convolution of MobileNetV2 takes one image 100 times as
long.
"""

import functools
import math
import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from common.network.execution import Network
from common.network.graph import CONVOLUTION, INPUT
from quantization.int8 import fusion
from quantization.int8.engines.base import Call, Program
from quantization.int8.fusion import FusedOperation

# Activations that a oneDNN convolution can run: its name for them, and their parameters.
FUSED = {
    None: ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "sigmoid": ("sigmoid", []),
    "silu": ("swish", []),
}
# From so many images on, oneDNN's convolutions with outputs of at most so many positions take 0.6
# of the time in its blocked layout: AVX-512, 512 channels, 4 × 4 positions, batch 32 and 128.
MANY_IMAGES, SMALL_MAP = 16, 16


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
def fp32_runner(network: Network) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the fastest form of an FP32 network on the CPU: maps images (N, C, H, W) to logits."""
    shapes, steps = network.shapes, fusion.fuse_activations(network.graph, FUSED)
    packs = can_pack()
    if packs:
        steps = fusion.fuse_additions(
            steps, network.graph, lambda step, added: shapes[step.name] == shapes[added]
        )
    calls = [
        _packed_convolution(step, steps, network)
        if packs and step.operation.kind == CONVOLUTION
        else _plain_call(step, network)
        for step in steps
    ]
    program = Program(calls)

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return program(images.contiguous(memory_format=torch.channels_last))

    return run


def _plain_call(step: FusedOperation, network: Network) -> Call:
    """Return the call of what runs in torch's usual kernels."""
    operation = step.operation
    if operation.kind == INPUT:
        return Call(step.name, lambda images: images, (step.name,))
    in_place = operation.name in network.overwriting

    def run(*values: torch.Tensor) -> torch.Tensor:
        return _activate(network.compute(operation, values, in_place), step, network)

    return Call(step.name, run, step.inputs)


def _activate(value: torch.Tensor, step: FusedOperation, network: Network) -> torch.Tensor:
    """Run the activation that is fused into a step, if there is one."""
    if step.activation is None:
        return value
    return network.compute(network.graph[step.name], [value], in_place=True)


def _packed_convolution(
    step: FusedOperation, steps: tuple[FusedOperation, ...], network: Network
) -> Call:
    operation, layer = step.operation, network.layers[step.operation.name]
    stride, padding, dilation, groups = operation.arguments
    geometry = (padding, stride, dilation, groups)  # in oneDNN's order
    pack = _packing(layer.weight, geometry, network.shapes[step.inputs[0]])
    bias = layer.bias.detach()
    blocked_bias = bias.to_mkldnn()
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    convolve_and_add = torch.ops.mkldnn._convolution_pointwise_.binary
    activation, parameters = FUSED[step.activation]
    # A fused addition runs no activation but ReLU.
    fused = activation if activation == "relu" else None
    is_free = step.added is not None and fusion.may_overwrite(step, steps)
    has_window = layer.weight[0, 0].numel() > 1 and groups == 1
    is_small = has_window and math.prod(network.shapes[operation.name][1:]) <= SMALL_MAP

    def run(value: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        weight = pack(len(value))
        if is_small and len(value) >= MANY_IMAGES:  # in the blocked layout nothing is fused
            sums = F.conv2d(value.to_mkldnn(), weight, blocked_bias, *operation.arguments)
            sums = sums.to_dense().contiguous(memory_format=torch.channels_last)
            return _activate(sums.add_(*added) if added else sums, step, network)
        if not added:
            return convolve(value, weight, bias, *geometry, activation, parameters, "")
        total = added[0] if is_free else added[0].clone(memory_format=torch.channels_last)
        convolve_and_add(total, value, weight, bias, *geometry, "add", 1.0, fused, [], "")
        return total if fused else _activate(total, step, network)

    return Call(step.name, run, step.inputs)


def _packing(
    weight: torch.Tensor, geometry: tuple, shape: Sequence[int]
) -> Callable[[int], torch.Tensor]:
    """Return what gives a weight in the layout for a number of images (C, H, W), made once."""
    plain = weight.detach().contiguous().to_mkldnn()

    @functools.lru_cache(2)  # one size comes after the other; the last batch may be smaller
    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(count: int) -> torch.Tensor:
        return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *geometry, [count, *shape])

    return pack
