"""A network's weights coded layer by layer, on calibration images without labels.

Each layer is coded on the outputs of the coded layers before it, towards the outputs of the dense
network at the same place. So a layer compensates for the errors of the layers before it (as in
GPTAQ, Li et al., 2025, arXiv:2504.02692): ridge regression from the coded inputs to the dense
outputs gives its weights, which are coded, and the bias absorbs the mean of the residuals. A layer
that completes an addition is coded towards the dense sum minus the coded other operand.

A network that was made from another one is coded towards the outputs of that one, so that it also
compensates for earlier errors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from common.command import cli
from common.command.cli import UserError
from common.images.data import ImageSet
from common.network import regression, sampling
from common.network.execution import Layer, Network
from common.network.graph import Graph, Operation
from common.network.walk import Walk, images_in_memory
from quantization.coding.levels import TOO_LARGE, fit_and_choose, repair_ridge
from quantization.int8.network import Int8Layer

BATCH_SIZE = 50
POSITIONS = 8  # random positions of each image's outputs that a layer is coded on
# A layer's error counts as a share of its outputs' variance. One more bit for every weight of a
# layer may cost ``price * size ** SIZE_POWER``, so one bit the price times one power less.
SIZE_POWER, REFERENCE_SIZE = 0.5, 1e6


@dataclass(frozen=True)
class Original:
    """The network that another one was made from."""

    network: Network  # original network
    # Indices (int64) of the original output channels that are left, for each layer that lost some;
    # None for a layer whose outputs training changed.
    channels: Mapping[str, torch.Tensor | None]


@torch.inference_mode()
def encode(
    network: Network, calibration: ImageSet, price: float, seed: int = 0,
    original: Original | None = None,
) -> dict[str, Int8Layer]:  # fmt: skip
    """Code the weights of an FP32 network on the CPU; return its layers in execution order.

    Each calibration image is used as it is and mirrored, as far as memory allows. The ``price`` of
    a bit is in millionths of the outputs' variance. ``seed`` draws the positions at which outputs
    are sampled. ``original`` is the network that this one was made from, if any.

    Raises:
        UserError: Activations are too large for FP16.
    """
    graph, layers = network.graph, {}
    samples = _Samples(network, calibration, seed, original or Original(network, {}))
    fine, progress = layers_on_the_image(graph), iter(cli.progress(graph.layers, "code"))
    for operation in graph.operations[1:]:
        name, replaced = operation.name, None
        for walk in samples.references:
            walk.step(name)
        if operation.is_layer:
            next(progress)
            layers[name] = _code(operation, samples, 0.0 if name in fine else price * 1e-6)
            replaced = layers[name].dense()
        samples.coded.step(name, replaced)
    next(progress, None)
    return layers


class _Samples:
    """Runs networks side by side; values are kept in float16.

    The outputs of the ``references`` are wanted: the original, then the network to code if training
    changed it.
    """

    def __init__(self, network: Network, calibration: ImageSet, seed: int, original: Original):
        self.network, self._channels = network, original.channels
        pixels = calibration.with_mirrored().images
        is_trained = None in original.channels.values()
        walked = [original.network] + [network] * is_trained + [network]
        count = images_in_memory(len(pixels), walked, torch.float16.itemsize)
        self._positions = POSITIONS * len(pixels) // count
        images = [calibration.normalize(batch) for batch in pixels[:count].split(BATCH_SIZE)]
        walks = [Walk(one, images, network.graph, torch.float16) for one in walked]
        *self.references, self.coded = walks
        self._generator = torch.Generator().manual_seed(seed)

    def draw_positions(self, operation: Operation) -> list[torch.Tensor | None]:
        """Draw positions of a layer's outputs, for each batch of images."""
        values = self.references[-1].batches(operation.name)
        return [sampling.draw_positions(v, self._positions, self._generator) for v in values]

    def at(
        self, operation: Operation, positions: Sequence[torch.Tensor | None]
    ) -> Iterator[sampling.Samples]:
        """Yield what a layer reads, and what it should give, at positions of each batch."""
        name = operation.name
        channels = self._channels.get(name, slice(None))
        source = self.references[0 if channels is not None else -1]
        _, operand = sampling.completed_sum(self.network, name)
        operands = [operand] if operand else []
        wanted = zip(*(source.batches(n) for n in (name, *operands)), strict=True)
        coded = zip(*(self.coded.batches(n) for n in (operation.inputs[0], *operands)), strict=True)
        layer = self.network.layers[name]
        for where, values, (x, *others) in zip(positions, wanted, coded, strict=True):
            y = sum(sampling.outputs_at(value, where) for value in values)
            y = y if channels is None else y[:, channels]
            added = sum(sampling.outputs_at(other, where) for other in others)
            rows = sampling.inputs_at(operation, layer, x, where)
            yield sampling.Samples(rows, y - added, added)


def _code(operation: Operation, samples: _Samples, price: float) -> Int8Layer:
    """Code one layer, at most ``MAX_COLUMNS`` of its inputs at a time."""
    layer = samples.network.layers[operation.name]
    kernel = layer.weight[0, 0].numel()
    weight, bias, steps = layer.weight.flatten(1).clone(), layer.bias, None
    levels = torch.empty_like(weight, dtype=torch.int8)
    price *= (weight.numel() / REFERENCE_SIZE) ** (SIZE_POWER - 1)
    width = max(1, regression.MAX_COLUMNS // kernel) * kernel
    positions = samples.draw_positions(operation)
    for start in range(0, weight.shape[1], width):
        part = slice(start, start + width)
        others = weight.clone()
        others[:, part] = 0
        some = Layer(weight[:, part], bias)
        moments = regression.measure_moments(
            some,
            operation.attributes.get("groups", 1),
            partial(_samples_of_part, samples, operation, positions, others, part),
            repair_ridge,
            sampling.active_range(samples.network, operation.name),
        )
        levels[:, part], steps, bias = fit_and_choose(some, moments, price, kernel, steps)
        weight[:, part] = levels[:, part] * steps[:, None]
    bias = bias.half().float()
    if not bias.isfinite().all():
        raise UserError(TOO_LARGE)
    return Int8Layer(levels.view_as(layer.weight), steps, bias)


def _samples_of_part(
    samples: _Samples, operation: Operation, positions: Sequence[torch.Tensor | None],
    others: torch.Tensor, part: slice,
) -> Iterator[sampling.Samples]:  # fmt: skip
    """Yield samples of ``part`` of a layer's inputs, to be fitted with the others as they are.

    ``others`` are the layer's weights, (O, columns), with zeros in this part.
    """
    has_others = bool(others.any())
    for rows, wanted, added in samples.at(operation, positions):
        given = sampling.outputs_of(rows, others) if has_others else 0.0
        yield sampling.Samples(rows[:, :, part], wanted - given, added + given)


def layers_on_the_image(graph: Graph) -> set[str]:
    """Return the names of the layers that read the image and no other layer's outputs.

    They have few weights and the whole network depends on them: on ResNet18 the first one, coded
    in fewer than 8 bits, cost four points.
    """
    readers = (reader for name in graph.layers for reader in graph.users[name])
    return set(graph.layers) - graph.affected_by(readers)
