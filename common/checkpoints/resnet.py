"""The ResNet family (He et al., 2016, https://arxiv.org/abs/1512.03385), built from a checkpoint.

The names and shapes of a checkpoint's tensors determine the network: CIFAR ResNets of depth 6n+2,
ResNet-18 and 34 (basic blocks), 50, 101 and 152 (bottlenecks), a 3×3 stem or a 7×7 stem followed by
a max pool, any widths and any number of classes. Modules bear the names that the checkpoint uses:
those of kuangliu/pytorch-cifar, or ``downsample`` and ``fc`` as in torchvision.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class BlockShape:
    """Output channels of a block's convolutions; whether its shortcut is a convolution too."""

    widths: tuple[int, ...]
    projects: bool


@dataclass(frozen=True)
class ResNetShape:
    """Sizes and names of a ResNet."""

    stem_kernel: int  # kernel size of the first convolution
    stem_width: int  # output channels of the first convolution
    stages: tuple[tuple[BlockShape, ...], ...]  # all stages but the first halve the image
    class_count: int
    shortcut: str = "shortcut"  # name of a block's shortcut
    head: str = "linear"  # name of the linear layer

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> "ResNetShape":
        """Read the shape from a state dict, in which single tensors may be missing or wrong.

        Tensors that are not those of a ResNet are a ValueError.
        """
        stem = shape_of(state, "conv1")
        if len(stem) != 4 or stem[2] not in (3, 7) or not all(stem):
            raise ValueError("no convolution conv1 of 3×3 or 7×7 pixels")
        layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
        heads = (name for name in layers if "." not in name and len(shape_of(state, name)) == 2)
        head = next(heads, "linear")
        shortcut = "downsample" if any(".downsample." in name for name in state) else "shortcut"
        stages = _read_stages(state, stem[0], shortcut)
        if not stages:
            raise ValueError("no block layer1.0")
        class_count = (shape_of(state, head) or (1,))[0]
        return cls(stem[2], stem[0], stages, class_count, shortcut, head)

    @property
    def family(self) -> str:
        """The name of the architecture, such as ``resnet18-cifar``; widths may be any."""
        blocks = [block for stage in self.stages for block in stage]
        depth = 2 + sum(len(block.widths) for block in blocks)
        return f"resnet{depth}-{'cifar' if self.stem_kernel == 3 else 'imagenet'}"


def resnet18_shape(class_count: int) -> ResNetShape:
    """Return the shape of the ResNet18 for CIFAR images: 11,173,962 parameters for ten classes."""
    stages = tuple(
        (BlockShape((width, width), projects=width > 64), BlockShape((width, width), False))
        for width in (64, 128, 256, 512)
    )
    return ResNetShape(3, 64, stages, class_count)


class ZeroPaddedShortcut(nn.Module):
    """The shortcut of "option A", without weights: skip pixels and add channels of zeros."""

    def __init__(self, stride: int, added_channels: int):
        super().__init__()
        self.stride = stride
        before = added_channels // 2
        self.padding = (0, 0, 0, 0, before, added_channels - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C + added channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Block(nn.Module):
    """Convolutions around which the input is added back: two of 3×3, or 1×1, 3×3 and 1×1."""

    def __init__(self, in_channels: int, shape: BlockShape, stride: int, shortcut: str):
        super().__init__()
        kernels = (3, 3) if len(shape.widths) == 2 else (1, 3, 1)
        self.depth, self.shortcut_name, channels = len(kernels), shortcut, in_channels
        for index, (kernel, width) in enumerate(zip(kernels, shape.widths, strict=True)):
            own_stride = stride if index == kernels.index(3) else 1
            conv = nn.Conv2d(channels, width, kernel, own_stride, kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", conv)
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(width))
            self.add_module(f"relu{index + 1}", nn.ReLU(inplace=True))
            channels = width
        skip = nn.Sequential()
        if shape.projects:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            skip = nn.Sequential(conv, nn.BatchNorm2d(channels))
        elif stride != 1 or in_channels != channels:
            skip = ZeroPaddedShortcut(stride, channels - in_channels)
        self.add_module(shortcut, skip)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = x
        for index in range(1, self.depth + 1):
            out = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(out))
            if index == self.depth:
                out = out + getattr(self, self.shortcut_name)(x)
            out = getattr(self, f"relu{index}")(out)
        return out


class ResNet(nn.Module):
    """A ResNet; by default a max pool follows the first convolution if that has 7×7 pixels."""

    def __init__(self, shape: ResNetShape, max_pool: bool | None = None):
        super().__init__()
        self.shape, kernel, channels = shape, shape.stem_kernel, shape.stem_width
        stride = 2 if kernel == 7 else 1
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        pools = kernel == 7 if max_pool is None else max_pool
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pools else nn.Identity()
        for index, blocks in enumerate(shape.stages):
            stage = nn.Sequential()
            for block in blocks:
                stride = 2 if index and not len(stage) else 1
                stage.append(Block(channels, block, stride, shape.shortcut))
                channels = block.widths[-1]
            self.add_module(f"layer{index + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.add_module(shape.head, nn.Linear(channels, shape.class_count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(len(self.shape.stages)):
            x = getattr(self, f"layer{index + 1}")(x)
        return getattr(self, self.shape.head)(torch.flatten(self.avgpool(x), 1))


def _read_stages(
    state: Mapping[str, torch.Tensor], channels: int, shortcut: str
) -> tuple[tuple[BlockShape, ...], ...]:
    present = {".".join(name.split(".")[:2]) for name in state}
    depth = 3 if "layer1.0.conv3.weight" in state else 2
    projecting = {block for block in present if len(shape_of(state, f"{block}.{shortcut}.0")) == 4}
    stages: list[tuple[BlockShape, ...]] = []
    while f"{(stage := f'layer{len(stages) + 1}')}.0" in present:
        out_channels = _width(state, f"{stage}.0.conv{depth}", channels)
        blocks: list[BlockShape] = []
        while (block := f"{stage}.{len(blocks)}") in present:
            inner = [_width(state, f"{block}.conv{i + 1}", out_channels) for i in range(depth - 1)]
            changes = not blocks and (bool(stages) or channels != out_channels)
            if changes and not projecting and out_channels < channels:
                raise ValueError(f"{block} has fewer channels than its input, and no shortcut")
            # Where one shortcut is a convolution, all are: a missing one is damage, no option A.
            projects = block in projecting or (changes and bool(projecting))
            blocks.append(BlockShape((*inner, out_channels), projects))
        stages.append(tuple(blocks))
        channels = out_channels
    return tuple(stages)


def shape_of(state: Mapping[str, torch.Tensor], layer: str) -> tuple[int, ...]:
    """Return the shape of a layer's weight; () where there is none."""
    weight = state.get(f"{layer}.weight")
    return () if weight is None else tuple(weight.shape)


def _width(state: Mapping[str, torch.Tensor], layer: str, otherwise: int) -> int:
    shape = shape_of(state, layer)
    return shape[0] if len(shape) == 4 and shape[0] else otherwise
