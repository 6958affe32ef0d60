"""A coded network's INT8 arithmetic in plain torch: for where torch has no INT8 kernels.

The same integers in the same order as the kernels: products of levels and activations are summed
exactly (in float64, which holds them), the bias is a whole number of their steps, and each sum is
rounded once into the next activation. Kernels multiply in float32, so that a sum close to a half
may round the other way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from common.command.cli import UserError
from common.network.coded import CodedNetwork
from common.network.resnet import BLOCKS

MAX_ACTIVATION = 255


class ReferenceNetwork(nn.Module):
    """Maps normalised images (N, 3, 32, 32) to float32 logits (N, 10).

    Args:
        network: All its layers are in INT8.

    Raises:
        UserError: It has layers in FP32.
    """

    def __init__(self, network: CodedNetwork):
        super().__init__()
        names = ["input", *BLOCKS, *network.layers]
        if len(network.activation_scales) != len(names):
            raise UserError("a network with layers in FP32 needs torch's INT8 kernels")
        self._scales = dict(zip(names, network.activation_scales.tolist(), strict=True))
        self._zero_points = dict(zip(names, network.activation_zero_points.tolist(), strict=True))
        self._layers = network.layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Run the network; activations are whole numbers, less their zero points."""
        here = self._quantize("input", images.double())
        here, name = self._run("conv1", "input", here).relu(), "conv1"
        for block in BLOCKS:
            shortcut = f"{block}.shortcut.0"
            stride = 2 if shortcut in self._layers else 1
            inner = self._run(f"{block}.conv1", name, here, stride).relu()
            branch = self._run(f"{block}.conv2", f"{block}.conv1", inner)
            if shortcut in self._layers:
                here, name = self._run(shortcut, name, here, stride), shortcut
            total = self._value(f"{block}.conv2", branch) + self._value(name, here)
            here, name = self._quantize(block, total.relu()), block
        pooled = here.mean((2, 3)).round()
        return self._value("linear", self._run("linear", name, pooled)).float()

    def _run(self, name: str, source: str, inputs: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """Run a layer on what ``source`` gave."""
        layer = self._layers[name]
        steps = self._scales[source] * layer.scales.double()
        bias, weight = (layer.bias / steps).round(), layer.weight.double()
        if weight.ndim == 2:
            return self._quantize(name, F.linear(inputs, weight, bias) * steps)
        padding = weight.shape[-1] // 2  # what is padded with 0 is the zero point
        sums = F.conv2d(inputs, weight, bias, stride, padding)
        return self._quantize(name, sums * steps[:, None, None])

    def _quantize(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return what values become (float64, whole numbers less the zero point)."""
        levels = (values / self._scales[name]).round() + self._zero_points[name]
        return levels.clamp(0, MAX_ACTIVATION) - self._zero_points[name]

    def _value(self, name: str, levels: torch.Tensor) -> torch.Tensor:
        return levels * self._scales[name]
