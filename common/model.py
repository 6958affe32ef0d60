"""ResNet18 for CIFAR-10 (He et al., 2016, https://arxiv.org/abs/1512.03385).

The CIFAR variant: a 3×3 stem of stride 1 and no max-pool, four stages of two basic blocks, a
global average pool and one linear layer; 11,173,962 parameters. The names of its tensors are those
of the course's ``resnet18_cifar10.pth``.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASS_COUNT = 10
STAGE_CHANNELS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around which the input is added back.

    The ReLUs are modules, and two of them, so that a quantizer can fuse each into the operation
    before it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ResNet18(nn.Module):
    """The network.

    Args:
        stage_channels: Channels of the four stages. Tests use narrow ones; a checkpoint fits the
            default only.
        class_count: Outputs of the linear layer.
    """

    def __init__(
        self, stage_channels: tuple[int, ...] = STAGE_CHANNELS, class_count: int = CLASS_COUNT
    ):
        super().__init__()
        stem = stage_channels[0]
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        in_channels = stem
        for index, out_channels in enumerate(stage_channels, start=1):
            stage = nn.Sequential(
                BasicBlock(in_channels, out_channels, stride=1 if index == 1 else 2),
                BasicBlock(out_channels, out_channels, stride=1),
            )
            self.add_module(f"layer{index}", stage)
            in_channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, class_count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the convolution and linear layers by name, in the order in which they run.

    A block's shortcut runs beside its convolutions; it is listed after them, as in the checkpoint.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def fold_batch_norm(model: ResNet18) -> ResNet18:
    """Return a copy whose convolutions compute their batch-norm too; ``model`` is in eval mode.

    The function is the same up to FP32 rounding; the copy is for inference, not for saving.
    """
    folded = copy.deepcopy(model)
    for module in (folded, *(m for m in folded.modules() if isinstance(m, BasicBlock))):
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(module, conv):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn))
                setattr(module, conv, fused)
                setattr(module, bn, nn.Identity())
        if isinstance(module, BasicBlock) and len(module.shortcut):
            module.shortcut = nn.Sequential(fuse_conv_bn_eval(*module.shortcut))
    return folded
