"""Corrections of the FP32 weights before quantization; none of them costs anything at run time.

Both rewrite a :class:`common.network.resnet.ResNet18` into another one that computes the same
function in FP32 (equalisation) or nearly so (bias correction), and loses less of it in INT8.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common.images.data import Cifar10, batches
from common.network.resnet import (
    BasicBlock,
    ResNet18,
    batch_norm_after,
    fold_batch_norm,
    hooked,
    prunable_layers,
)
from quantization.accuracy.quantizers import quantize_weight


def absorb_batch_norm(model: ResNet18) -> ResNet18:
    """Return a copy with batch-norm folded into the convolutions, in the original structure.

    Every batch-norm that stays is an identity but for its bias, which is the folded one. So the
    result is a ResNet18 like any other: it can be saved, loaded and quantized.
    """
    absorbed, folded = copy.deepcopy(model), prunable_layers(fold_batch_norm(model))
    for name, conv in folded.items():
        if name == "linear":
            continue
        absorbed.get_submodule(name).weight.data.copy_(conv.weight)
        norm = absorbed.get_submodule(batch_norm_after(name))
        nn.init.ones_(norm.weight)
        norm.bias.data.copy_(conv.bias)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)  # so that it divides by sqrt(1 - eps + eps) = 1
    return absorbed


@torch.no_grad()
def equalize_cross_layer(model: ResNet18) -> ResNet18:
    """Return a copy in which the channels between a block's convolutions have like ranges.

    A channel c between conv1 and conv2 can be scaled by any s > 0, for ReLU(s·x) = s·ReLU(x): conv1
    gives s times as much, conv2 takes 1/s of it. The s that makes the two convolutions' ranges of c
    equal leaves per-tensor activations no channel that dwarfs the others (Nagel et al., 2019,
    https://arxiv.org/abs/1906.04721, equation 11).
    """
    equalized = absorb_batch_norm(model)
    for block in (m for m in equalized.modules() if isinstance(m, BasicBlock)):
        ranges1 = block.conv1.weight.abs().amax(dim=(1, 2, 3))
        ranges2 = block.conv2.weight.abs().amax(dim=(0, 2, 3))
        scale = (ranges2 / ranges1).sqrt()
        # A dead channel has no range to equalise.
        scale = torch.where((ranges1 > 0) & (ranges2 > 0), scale, 1.0)
        block.conv1.weight.mul_(scale.view(-1, 1, 1, 1))
        block.bn1.bias.mul_(scale)
        block.conv2.weight.div_(scale.view(1, -1, 1, 1))
    return equalized


@torch.no_grad()
def correct_biases(model: ResNet18, calibration: Cifar10, batch_size: int) -> ResNet18:
    """Return a copy whose biases cancel the mean error that rounding the weights will make.

    The mean is taken over images and positions, channel by channel: E[conv(x, w) − conv(x, ŵ)]
    (Nagel et al., 2019, section 4.2, measured on calibration images instead of derived).
    """
    corrected = absorb_batch_norm(model)
    layers = prunable_layers(corrected)
    totals = {name: torch.zeros(len(layer.weight)) for name, layer in layers.items()}

    def measure(name: str, layer: nn.Conv2d | nn.Linear, inputs: tuple[torch.Tensor], _) -> None:
        rounding = layer.weight - quantize_weight(layer.weight)
        if isinstance(layer, nn.Linear):
            totals[name] += F.linear(inputs[0], rounding).sum(dim=0)
        else:
            error = F.conv2d(inputs[0], rounding, None, layer.stride, layer.padding)
            totals[name] += error.mean(dim=(2, 3)).sum(dim=0)

    with hooked(layers, measure):
        for images, _ in batches(calibration, batch_size):
            corrected(images)
    for name, total in totals.items():
        layer = corrected.get_submodule(batch_norm_after(name))  # the linear layer is its own
        layer.bias += total / len(calibration)
    return corrected
