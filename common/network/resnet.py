"""ResNet18 for CIFAR-10 (He et al., 2016, https://arxiv.org/abs/1512.03385).

The CIFAR variant: a 3×3 stem of stride 1 and no max-pool, four stages of two basic blocks, a
global average pool and one linear layer; 11,173,962 parameters. The names of its tensors are those
of the course's ``resnet18_cifar10.pth``. Without some of its channels it is the same network of
other widths.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

CLASS_COUNT = 10
BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
MAX_WIDTH = 1024  # twice the published network's; a file may ask for anything


@dataclass(frozen=True)
class Widths:
    """How many channels the network has where.

    Attributes:
        stages: Of the four stages' outputs, which all blocks of a stage add to; the stem gives the
            first.
        inner: Between the two convolutions of each block of ``BLOCKS``; by default its stage's.

    Raises:
        ValueError: They are not four and eight numbers from 1 to ``MAX_WIDTH``.
    """

    stages: tuple[int, ...] = (64, 128, 256, 512)
    inner: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.inner:
            object.__setattr__(self, "inner", tuple(w for w in self.stages for _ in range(2)))
        for numbers, count in ((self.stages, 4), (self.inner, 8)):
            sane = all(type(width) is int and 1 <= width <= MAX_WIDTH for width in numbers)
            if len(numbers) != count or not sane:
                raise ValueError(f"{count} widths from 1 to {MAX_WIDTH:,} are needed: {numbers}")

    @classmethod
    def of(cls, state: Mapping[str, object]) -> Widths:
        """Read the widths off the shapes of a state dict, FP32 or INT8, in the canonical layout.

        Raises:
            ValueError: A convolution is not there, or is as wide as none.
        """

        def outputs(layer: str) -> int:
            weight = state.get(f"{layer}.weight")
            if not isinstance(weight, torch.Tensor) or weight.ndim != 4:
                raise ValueError(f"no convolution {layer}")
            if not 1 <= len(weight) <= MAX_WIDTH:
                raise ValueError(f"{layer} has {len(weight):,} channels, not 1 to {MAX_WIDTH:,}")
            return len(weight)

        stem, *later = (outputs(name) for name in ("conv1", *(f"{b}.conv2" for b in BLOCKS[2::2])))
        return cls((stem, *later), tuple(outputs(f"{block}.conv1") for block in BLOCKS))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around which the input is added back.

    The ReLUs are modules, and two of them, so that a quantizer can fuse each into the operation
    before it.
    """

    def __init__(self, in_channels: int, inner_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, 3, padding=1, bias=False)
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
        widths: Its channels; kept as ``widths``.
        class_count: Outputs of the linear layer.
    """

    def __init__(self, widths: Widths = Widths(), class_count: int = CLASS_COUNT):
        super().__init__()
        self.widths = widths
        in_channels = widths.stages[0]
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        for index, out_channels in enumerate(widths.stages):
            first, second = widths.inner[2 * index : 2 * index + 2]
            stage = nn.Sequential(
                BasicBlock(in_channels, first, out_channels, stride=2 if index else 1),
                BasicBlock(out_channels, second, out_channels, stride=1),
            )
            self.add_module(f"layer{index + 1}", stage)
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


def count_weights(widths: Widths) -> int:
    """Return the number of weights in the convolution and linear layers of a network."""
    with torch.device("meta"):
        return sum(layer.weight.numel() for layer in prunable_layers(ResNet18(widths)).values())


@contextlib.contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Have ``hook`` called with name, layer, inputs and output whenever a layer has run."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_norm_after(convolution: str) -> str:
    """Return the name of the batch norm that follows a convolution."""
    return convolution.replace("conv", "bn").replace("shortcut.0", "shortcut.1")


def fold_weights(model: ResNet18, convolution: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a convolution that does its batch norm, in eval mode, as well."""
    conv = model.get_submodule(convolution)
    norm = model.get_submodule(batch_norm_after(convolution))
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    return weight.detach(), bias.detach()


def fold_batch_norm(model: ResNet18) -> ResNet18:
    """Return a copy whose convolutions compute their batch-norm too; ``model`` is in eval mode.

    The function is the same up to FP32 rounding; the copy is for inference, not for saving.
    """
    folded = copy.deepcopy(model)
    for name, layer in prunable_layers(folded).items():
        if isinstance(layer, nn.Conv2d):
            layer.weight, layer.bias = map(nn.Parameter, fold_weights(model, name))
            folded.set_submodule(batch_norm_after(name), nn.Identity())
    return folded
