"""The ResNet18 for CIFAR images of any widths, written by hand for tests."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from common.checkpoints.resnet import BlockShape, ResNet, ResNetShape

CLASS_COUNT = 10
BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
MAX_WIDTH = 1024


def weight_modules(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the convolution and linear layers by name, in the order of their definition."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


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


class ResNet18(ResNet):
    """The ResNet18 for CIFAR images, of other widths too."""

    def __init__(self, widths: Widths = Widths(), class_count: int = CLASS_COUNT):
        inner, stages, channels = iter(widths.inner), [], widths.stages[0]
        for index, width in enumerate(widths.stages):
            blocks = [BlockShape((next(inner), width), projects=index > 0 or width != channels)]
            stages.append((*blocks, BlockShape((next(inner), width), projects=False)))
            channels = width
        super().__init__(ResNetShape(3, widths.stages[0], tuple(stages), class_count))

    @property
    def widths(self) -> Widths:
        """The widths of the network as it is."""
        return Widths.of(self.state_dict())


def count_weights(widths: Widths) -> int:
    """Return the number of weights in the convolution and linear layers of a network."""
    with torch.device("meta"):
        return sum(layer.weight.numel() for layer in weight_modules(ResNet18(widths)).values())


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
    for name, layer in weight_modules(folded).items():
        if isinstance(layer, nn.Conv2d):
            layer.weight, layer.bias = map(nn.Parameter, fold_weights(model, name))
            folded.set_submodule(batch_norm_after(name), nn.Identity())
    return folded
