"""A pruned network in INT8: its zeros stay zeros, and pay for a smaller file."""

from __future__ import annotations

from pathlib import Path

from torch.fx import GraphModule

from common.network.coded import save_coded
from common.network.resnet import ResNet18, prunable_layers
from quantization.coding.kernels import from_int8
from quantization.int8.deploy import Quantized
from quantization.int8.operations import layer_of

PACKED_NAME = "resnet18_cifar10_int8_packed.safetensors"
# Below this fraction of zeros a network was not pruned: single weights may be zero by chance.
MIN_SPARSITY = 0.01


def count_zeros(model: ResNet18, converted: GraphModule) -> dict:
    """Count the zeros before and after quantization, and check that none was lost.

    Weights are quantized symmetrically (zero point 0), so 0 is exactly representable, and folding
    batch-norm or equalising channels only scales it. Rounding makes more zeros of small weights.

    Args:
        model: FP32, as it was loaded.
        converted: The INT8 model made from it.

    Returns:
        The numbers of ``weights``, of ``zeros_before`` and of ``zeros_after``.
    """
    weights = before = after = 0
    for name, layer in prunable_layers(model).items():
        quantized = layer_of(converted, name).weight
        quantized = quantized() if callable(quantized) else quantized  # a method, where in INT8
        values = quantized.int_repr() if quantized.is_quantized else quantized
        was_zero, is_zero = layer.weight == 0, values == 0
        if lost := int((was_zero & ~is_zero).sum()):
            raise AssertionError(f"{name}: {lost} zeros are no longer zero in INT8")
        weights += was_zero.numel()
        before += int(was_zero.sum())
        after += int(is_zero.sum())
    return {"weights": weights, "zeros_before": before, "zeros_after": after}


def pack(quantized: Quantized, fp32_bytes: int, given_bytes: int, path: Path) -> dict:
    """Write an INT8 model packed; return its part of results.json's ``sparsity``.

    Args:
        quantized: The INT8 model.
        fp32_bytes: Size of the FP32 checkpoint.
        given_bytes: Size of the file that the weights were read from.
        path: The file to write.
    """
    size_bytes = save_coded(from_int8(quantized.model, quantized.settings), path)
    return {
        "packed": {
            "file": path.name,
            "size_bytes": size_bytes,
            "size_ratio": size_bytes / fp32_bytes,
            "size_ratio_given": size_bytes / given_bytes,
        }
    }
