"""A network's weights coded layer by layer, on calibration images without labels.

Each layer is coded on the outputs of the coded layers before it, towards the outputs of the dense
network at the same place. So a layer compensates for the errors of the layers before it (as in
GPTAQ, Li et al., 2025, arXiv:2504.02692): ridge regression from the coded inputs to the dense
outputs gives its weights, which are coded, and the bias absorbs the mean of the residuals. A layer
that completes an addition is coded towards the dense sum minus the coded other operand.

A network that was made from another one is coded towards the outputs of that one, so that it also
compensates for earlier errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from common.command import cli
from common.command.cli import UserError
from common.images.data import ImageSet
from common.network.execution import Layer, Network
from common.network.graph import Graph, Operation
from common.network.regression import (
    MAX_COLUMNS,
    Moments,
    MomentSums,
    completed_sum,
    draw_positions,
    inputs_at,
    outputs_at,
    outputs_of,
    with_ridge,
)
from common.network.walk import Walk, peak_bytes_per_image
from quantization.coding.levels import MAX_LEVEL, choose_levels
from quantization.int8.network import Int8Layer

BATCH_SIZE = 50
POSITIONS = 8  # random positions of each image's outputs that a layer is coded on
MEMORY_BYTES = 4_000_000_000  # memory that the values of all images may take
RIDGE = 0.01  # share of the mean variance of a layer's inputs
REPAIR_RIDGE = 0.2  # the same for the regression, which would otherwise fit the images at hand
# A layer's error counts as a share of its outputs' variance. One more bit for every weight of a
# layer may cost ``price * size ** SIZE_POWER``, so one bit the price times one power less.
SIZE_POWER, REFERENCE_SIZE = 0.5, 1e6
SMALLEST_SPREAD = 1e-3  # inputs after a layer of zeros vary by rounding only
SMALLEST_STEP = 2.0**-14  # smallest normal FP16 number
STEP_PRICES = 60.0  # square of a step, in prices of a bit
TOO_LARGE = "activations beyond 65,504, the largest of FP16, cannot be coded"


@dataclass(frozen=True)
class Original:
    """The network that another one was made from.

    Attributes:
        network: Original network.
        channels: For each layer with other output channels than the original, the indices of those
            that are left (int64), or None where training changed what they compute.
    """

    network: Network
    channels: Mapping[str, torch.Tensor | None]


@torch.inference_mode()
def encode(
    network: Network,
    calibration: ImageSet,
    price: float,
    seed: int = 0,
    original: Original | None = None,
) -> dict[str, Int8Layer]:
    """Code a network's weights; return its layers by name, in execution order.

    Args:
        network: FP32 network, on the CPU.
        calibration: Images, each used as it is and mirrored, as far as memory allows.
        price: Price of a bit, in millionths of the outputs' variance.
        seed: Seed of the positions at which outputs are sampled.
        original: Network that this one was made from, if any.

    Raises:
        UserError: Activations are too large for FP16.
    """
    return _Encoder(network, calibration, price, seed, original).encode()


class _Encoder:
    """Runs the dense and the coded network side by side; values are kept in float16."""

    def __init__(
        self,
        network: Network,
        calibration: ImageSet,
        price: float,
        seed: int,
        original: Original | None,
    ):
        self._network, self._price = network, price
        dense = network if original is None else original.network
        self._channels = {} if original is None else original.channels
        pixels = torch.cat([calibration.images, calibration.images.flip(3)])
        is_trained = None in self._channels.values()
        walked = [dense, network] + [network] * is_trained
        peak = sum(peak_bytes_per_image(one, torch.float16.itemsize) for one in walked)
        count = max(1, min(len(pixels), MEMORY_BYTES // peak))
        if count < len(pixels):
            cli.log.info("coding on %d of %d images, to save memory", count, len(pixels))
        self._positions = POSITIONS * len(pixels) // count
        images = [calibration.normalize(batch) for batch in pixels[:count].split(BATCH_SIZE)]

        def walk(walked: Network) -> Walk:
            return Walk(walked, images, network.graph, torch.float16)

        self._dense, self._coded = walk(dense), walk(network)
        self._own = walk(network) if is_trained else None
        self._generator = torch.Generator().manual_seed(seed)
        self._fine = layers_on_the_image(network.graph)

    def encode(self) -> dict[str, Int8Layer]:
        """Code every layer."""
        graph = self._network.graph
        layers: dict[str, Int8Layer] = {}
        progress = iter(cli.progress(graph.layers, "code"))
        for operation in graph.operations[1:]:
            self._dense.step(operation.name)
            if self._own is not None:
                self._own.step(operation.name)
            replaced = None
            if operation.is_layer:
                next(progress)
                coded = self._code(operation)
                layers[operation.name] = coded
                replaced = coded.dense()
            self._coded.step(operation.name, replaced)
        next(progress, None)
        return layers

    def _code(self, operation: Operation) -> Int8Layer:
        """Code one layer, at most ``MAX_COLUMNS`` of its inputs at a time."""
        layer = self._network.layers[operation.name]
        kernel = layer.weight[0, 0].numel()
        weight, bias, steps = layer.weight.flatten(1).clone(), layer.bias, None
        levels = torch.empty_like(weight, dtype=torch.int8)
        price = 0.0 if operation.name in self._fine else self._price * 1e-6
        price *= (weight.numel() / REFERENCE_SIZE) ** (SIZE_POWER - 1)
        width = max(1, MAX_COLUMNS // kernel) * kernel
        for start in range(0, weight.shape[1], width):
            part = slice(start, start + width)
            moments = self._measure(operation, Layer(weight, bias), part)
            some = Layer(weight[:, part], bias)
            levels[:, part], steps, bias = _choose(some, moments, price, kernel, steps)
            weight[:, part] = levels[:, part] * steps[:, None]
        bias = bias.half().float()
        if not bias.isfinite().all():
            raise UserError(TOO_LARGE)
        return Int8Layer(levels.view_as(layer.weight), steps, bias)

    def _measure(self, operation: Operation, layer: Layer, part: slice) -> Moments:
        """Return moments of ``part`` of a layer's inputs, and of the whole layer's residuals."""
        sums = MomentSums(Layer(layer.weight[:, part], layer.bias), _groups(operation))
        others = layer.weight.clone()
        others[:, part] = 0
        has_others = bool(others.any())
        for rows, wanted in self._samples(operation):
            if has_others:
                wanted = wanted - outputs_of(rows, others)
            sums.add(rows[:, :, part], wanted)
        return sums.moments()

    def _samples(self, operation: Operation) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs (n, groups, columns) and wanted outputs (n, O)."""
        name = operation.name
        channels = self._channels.get(name, slice(None))
        source = self._dense
        if channels is None:
            source, channels = self._own, slice(None)
        completed = completed_sum(self._network, name)
        added = [] if completed is None else [completed[1]]
        wanted = zip(*(source.batches(n) for n in (name, *added)), strict=True)
        coded = zip(*(self._coded.batches(n) for n in (operation.inputs[0], *added)), strict=True)
        layer = self._network.layers[name]
        for values, (x, *others) in zip(wanted, coded, strict=True):
            where = draw_positions(values[0], self._positions, self._generator)
            y = sum(outputs_at(value, where) for value in values)[:, channels]
            for other in others:
                y -= outputs_at(other, where)
            yield inputs_at(operation, layer, x, where), y


def _choose(
    layer: Layer, moments: Moments, price: float, kernel: int, steps: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a layer's levels, int8, (O, columns), its steps (O,) and its bias.

    ``price`` is that of a bit as a share of the outputs' variance, 0 for 8 bits a weight;
    ``steps`` are given if other inputs of the layer were coded before.
    """
    covariance = moments.covariance
    if not (math.isfinite(moments.variance) and covariance.isfinite().all()):
        raise UserError(TOO_LARGE)
    spread = covariance.diagonal(dim1=1, dim2=2).mean(1)
    spread = spread.maximum(SMALLEST_SPREAD * (1 + moments.mean.square().mean(1)))
    wanted = moments.refit(layer, REPAIR_RIDGE * spread).weight
    bit = price * moments.variance
    if steps is None:
        finest = wanted.abs().amax(1).clamp(min=MAX_LEVEL * SMALLEST_STEP) / MAX_LEVEL
        steps = finest if bit == 0 else _coarse_steps(finest, STEP_PRICES * bit / spread)
        steps = steps.half().float()  # as the file keeps them
    damped = with_ridge(covariance, RIDGE * spread)
    levels = choose_levels(wanted, damped, steps, bit, kernel)
    return levels, steps, moments.best_bias(layer, levels * steps[:, None])


def _coarse_steps(finest: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return the steps, the same for all outputs of a group and at least its largest ``finest``."""
    steps = squares.sqrt().maximum(finest.unflatten(0, (len(squares), -1)).amax(1))
    return steps.repeat_interleave(len(finest) // len(squares))


def _groups(operation: Operation) -> int:
    return operation.attributes.get("groups", 1)


def layers_on_the_image(graph: Graph) -> set[str]:
    """Return the names of the layers that read the image and no other layer's outputs.

    They have few weights and the whole network depends on them: on ResNet18 the first one, coded
    in fewer than 8 bits, cost four points.
    """
    later: set[str] = set()
    for operation in graph.operations:
        if any(name in later or graph[name].is_layer for name in operation.inputs):
            later.add(operation.name)
    return set(graph.layers) - later
