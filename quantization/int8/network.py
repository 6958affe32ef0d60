"""An INT8 network: integers, their scales and the graph, in plain tensors that any engine runs.

Values between operations are uint8: a level stands for the real value (level - zero point) * scale.
Weights are int8, symmetric, with one scale for each output channel. A layer sums products of levels
in int32, adds its bias, rounded to a multiple of the two scales' product, applies the activation
behind it and rounds the result once into its output's range (Jacob et al., 2018,
https://arxiv.org/abs/1712.05877).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.network import graph as kinds
from common.network.execution import Layer, Network
from common.network.graph import Graph, Operation
from common.network.operations import infer_shapes
from quantization.int8.fusion import FusedOperation, fuse_activations
from quantization.settings import Settings

MAX_LEVEL = 255
# Operations whose output has the range of their input, since they only move or average levels.
SAME_RANGE = (*kinds.POOLS, kinds.PAD, *kinds.VIEWS)
# What a fused activation does to real values.
CLIPS = {None: lambda values: values, "relu": F.relu, "relu6": F.relu6}


@dataclass(frozen=True)
class ValueRange:
    """How real values are stored in uint8: real = (level - zero_point) * scale.

    Levels go from 0 to 255. Where ``reduce_range`` was chosen the observed range takes 0 to 127,
    and values beyond it take the levels above.
    """

    scale: float  # real value of one level; positive, a float32 number
    zero_point: int  # level of the real value 0

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest real value."""
        return -self.zero_point * self.scale, (MAX_LEVEL - self.zero_point) * self.scale

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Return real values as INT8 stores them; same shape, FP32."""
        # torch.fake_quantize_per_tensor_affine computes the same, but 30 times slower.
        levels = (values * (1 / self.scale)).round_()
        return levels.clamp_(-self.zero_point, MAX_LEVEL - self.zero_point).mul_(self.scale)


@dataclass(frozen=True)
class Int8Layer:
    """A convolution or linear layer, its batch norm folded; or an affine operation, in FP32."""

    # int8 levels, or float32 weights in FP32: (O, I / groups, height, width), (O, I) or (C,).
    weight: torch.Tensor
    scales: torch.Tensor | None  # real value of a level in each channel, float32, (O,); FP32: none
    bias: torch.Tensor  # real bias, float32, (O,); INT8 rounds it to a multiple of both scales

    @property
    def is_int8(self) -> bool:
        """Whether the layer runs in INT8."""
        return self.scales is not None

    def dense(self) -> Layer:
        """Return the layer in float32."""
        if self.scales is None:
            return Layer(self.weight, self.bias)
        shape = (-1, *[1] * (self.weight.ndim - 1))
        return Layer(self.weight * self.scales.view(shape), self.bias)

    def bias_levels(self, input_scale: float) -> torch.Tensor:
        """Return the bias in multiples of the scales' product: whole float64 numbers, (O,)."""
        return (self.bias.double() / (input_scale * self.scales.double())).round()


@dataclass(frozen=True)
class Int8Network:
    """A network ready to run in INT8 on any engine."""

    graph: Graph  # the operations; the input's attribute ``shape`` is that of an image
    layers: Mapping[str, Int8Layer]  # operations with weights
    # Range of each value that is kept in uint8. Others are FP32, or are results within a fused
    # operation, which are never stored.
    ranges: Mapping[str, ValueRange]
    # What belongs to images, as :class:`common.images.data.ImageSet` has it.
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Settings  # how it was made
    channel_order: str = "rgb"
    resize: int | None = None

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each operation's value for one image, without the batch dimension."""
        return infer_shapes(self.graph, {name: x.weight.shape for name, x in self.layers.items()})

    def steps(self) -> tuple[FusedOperation, ...]:
        """Return the fused operations in execution order; the first is the input."""
        return fuse_activations(self.graph)

    def is_int8(self, operation: Operation) -> bool:
        """Return whether an operation runs on integers."""
        return operation.name not in self.layers or self.layers[operation.name].is_int8

    def values_in_uint8(self) -> set[str]:
        """Return the names of the values that an integer operation gives or reads."""
        kept: set[str] = set()
        for step in self.steps()[1:]:
            if self.is_int8(step.operation):
                kept.update((step.name, *step.inputs))
        return kept

    def fp32_part(self) -> Network:
        """Return the graph, with weights only for the operations that run in FP32."""
        in_fp32 = {name: x.dense() for name, x in self.layers.items() if not x.is_int8}
        return Network(self.graph, in_fp32)
