"""The ResNet family (He et al., 2016, https://arxiv.org/abs/1512.03385), built from a checkpoint.

The names and shapes of its tensors say all there is to know about a network: CIFAR ResNets of depth
6n+2, ResNet-18 and 34 (basic blocks), 50, 101 and 152 (bottlenecks), a stem of 3×3 pixels or of
7×7 with a max pool after it, any widths and any number of classes. Modules bear the names that the
checkpoint uses: those of kuangliu/pytorch-cifar, or ``downsample`` and ``fc`` as in torchvision.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

STEM_KERNELS = (3, 7)
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)  # kernel sizes of a block's convolutions


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a residual block.

    Attributes:
        widths: Output channels of each convolution.
        projects: Whether the shortcut is a convolution with a batch norm.
    """

    widths: tuple[int, ...]
    projects: bool


@dataclass(frozen=True)
class ResNetShape:
    """Sizes and names of a ResNet.

    Attributes:
        stem_kernel: Kernel size of the first convolution.
        stem_width: Output channels of the first convolution.
        stages: Blocks of each stage; all stages but the first halve the image.
        class_count: Number of classes.
        shortcut: Name of a block's shortcut.
        head: Name of the linear layer.
    """

    stem_kernel: int
    stem_width: int
    stages: tuple[tuple[BlockShape, ...], ...]
    class_count: int
    shortcut: str = "shortcut"
    head: str = "linear"

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> ResNetShape:
        """Read the shape off a state dict, in which single tensors may be missing or wrong.

        Raises:
            ValueError: The tensors are not those of a ResNet.
        """
        stem = shape_of(state, "conv1")
        if len(stem) != 4 or stem[2] not in STEM_KERNELS or not all(stem):
            raise ValueError("no convolution conv1 of 3×3 or 7×7 pixels")
        heads = [
            name.removesuffix(".weight")
            for name, tensor in state.items()
            if name.endswith(".weight") and name.count(".") == 1 and tensor.ndim == 2
        ]
        head = heads[0] if heads else "linear"
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
    """A shortcut without weights ("option A"): skips pixels, and adds channels of zeros."""

    def __init__(self, stride: int, added_channels: int):
        super().__init__()
        self.stride = stride
        before = added_channels // 2
        self.padding = (0, 0, 0, 0, before, added_channels - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C + added channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Block(nn.Module):
    """Convolutions around which the input is added back: two of 3×3, or 1×1, 3×3 and 1×1.

    Args:
        in_channels: Input channels.
        shape: Widths of the block.
        stride: Stride of the first 3×3 convolution, and of the shortcut.
        shortcut: Name of the shortcut.
    """

    def __init__(self, in_channels: int, shape: BlockShape, stride: int, shortcut: str):
        super().__init__()
        kernels = BASIC if len(shape.widths) == 2 else BOTTLENECK
        self.depth, self.shortcut_name, out_channels = len(kernels), shortcut, shape.widths[-1]
        channels = in_channels
        for index, (kernel, width) in enumerate(zip(kernels, shape.widths, strict=True)):
            own_stride = stride if index == kernels.index(3) else 1
            conv = nn.Conv2d(channels, width, kernel, own_stride, kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", conv)
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(width))
            if index + 1 < self.depth:
                self.add_module(f"relu{index + 1}", nn.ReLU(inplace=True))
            channels = width
        if shape.projects:
            self.add_module(
                shortcut,
                nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                    nn.BatchNorm2d(out_channels),
                ),
            )
        elif stride != 1 or in_channels != out_channels:
            self.add_module(shortcut, ZeroPaddedShortcut(stride, out_channels - in_channels))
        else:
            self.add_module(shortcut, nn.Sequential())
        self.add_module(f"relu{self.depth}", nn.ReLU(inplace=True))

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
    """A ResNet.

    Args:
        shape: Sizes and names.
        max_pool: Whether a max pool follows the first convolution; by default after one of 7×7.
    """

    def __init__(self, shape: ResNetShape, max_pool: bool | None = None):
        super().__init__()
        self.shape, kernel, channels = shape, shape.stem_kernel, shape.stem_width
        self.conv1 = nn.Conv2d(
            3, channels, kernel, 2 if kernel == 7 else 1, kernel // 2, bias=False
        )
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
    while f"layer{len(stages) + 1}.0" in present:
        stage = f"layer{len(stages) + 1}"
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


def build_resnet(state: Mapping[str, torch.Tensor], max_pool: bool | None = None) -> ResNet:
    """Return the network that a state dict in FP32 belongs to, in eval mode, with its tensors.

    No random numbers are drawn.

    Raises:
        ValueError, RuntimeError: The tensors are not those of a ResNet.
    """
    with torch.device("meta"):
        model = ResNet(ResNetShape.of(state), max_pool)
    model.load_state_dict(state, assign=True)
    return model.eval()


def weight_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the convolution and linear layers by name, in the order of their definition."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


# --- until the integration of the graph: removed with the last module that needs it ---------------

CLASS_COUNT = 10
BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
MAX_WIDTH = 1024
BasicBlock = Block
prunable_layers = weight_layers


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


ResNet.widths = property(lambda self: Widths.of(self.state_dict()))


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
