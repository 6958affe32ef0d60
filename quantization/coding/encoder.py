"""A network's weights coded layer by layer, on calibration images without labels.

Each layer is coded on the outputs of the coded layers before it, towards the outputs of the dense
network at the same place. So a layer compensates for the errors of the layers before it (as in
GPTAQ, Li et al., 2025, arXiv:2504.02692): ridge regression from the coded inputs to the dense
outputs gives its weights, which are coded, and the bias absorbs the mean of the residuals. A layer
that completes an addition is coded towards the dense sum minus the coded other operand.

A network that was made from another one is coded towards the outputs of that one, so that it also
compensates for earlier errors.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.command import cli
from common.command.cli import UserError
from common.fitting import regression, sampling
from common.fitting.targets import Targets, record_targets
from common.fitting.walk import mirrored_pairs
from common.images.data import ImageSet
from common.network.execution import Layer, Network
from common.network.graph import Graph, Operation, evaluate
from quantization.coding.levels import TOO_LARGE, fit_and_choose, repair_ridge
from quantization.int8.network import Int8Layer

BATCH_SIZE = 50
POSITIONS = 8  # random positions of each image's outputs that a layer is coded on
# Divergence of a coded network over that with noise: 1.2 to 4.4, for MobileNetV2 and ResNet18.
NOISE_RATIO = 3.0
TRIED_PRICE = 0.02  # price of a bit whose errors the noise stands for
LEAST_SHARE = 0.2  # share of the allowed divergence that coding gets in any case

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


def coding_targets(
    network: Network, calibration: ImageSet, seed: int = 0, original: Original | None = None
) -> Targets:
    """Return what the layers of an FP32 network on the CPU should give, at any price of a bit.

    Each calibration image is used as it is and mirrored, as far as memory allows; labels are not
    used. ``seed`` draws the positions. The targets are the outputs of the ``original`` that the
    network was made from, if any; of a layer whose outputs training changed, those that it gives.
    """
    original = original or Original(network, {})
    images = mirrored_pairs(calibration, [original.network, network], torch.float16.itemsize)
    count = POSITIONS * 2 * len(calibration) // len(images)
    sizes = [len(batch) for batch in images.labels.split(BATCH_SIZE)]
    generator = torch.Generator().manual_seed(seed)
    positions, outputs = {}, {}
    for name in network.graph.layers:
        shape = network.shapes[name]
        positions[name] = [sampling.draw_positions((n, *shape), count, generator) for n in sizes]
    own = {name for name, channels in original.channels.items() if channels is None}
    for source, is_own in ((original.network, False), (network, True)):
        places = {name: x for name, x in positions.items() if (name in own) is is_own}
        if places:
            recorded = record_targets(source, network, images, BATCH_SIZE, places, torch.float16)
            outputs |= recorded.outputs
    return Targets(images, BATCH_SIZE, positions, outputs, original.channels)


@torch.inference_mode()
def encode(network: Network, targets: Targets, price: float) -> dict[str, Int8Layer]:
    """Code the weights of an FP32 network on the CPU; return its layers in execution order.

    The ``price`` of a bit is in millionths of the outputs' variance. ``targets`` are those of
    :func:`coding_targets`.

    Raises:
        UserError: Activations are too large for FP16.
    """
    graph, layers = network.graph, {}
    walk = targets.walk(network, torch.float32, torch.float16)
    fine, progress = layers_on_the_image(graph), iter(cli.progress(graph.layers, "code"))
    for operation in graph.operations[1:]:
        name, replaced = operation.name, None
        if operation.is_layer:
            next(progress)
            draw = partial(targets.samples, network, name, walk)
            layers[name] = _code(network, operation, draw, 0.0 if name in fine else price * 1e-6)
            replaced = layers[name].dense()
        walk.step(name, replaced)
    next(progress, None)
    return layers


@torch.inference_mode()
def estimate_price(network: Network, dense: Network, images: ImageSet, nats: float) -> float:
    """Return the price of a bit at which a network, once coded, diverges by about ``nats``.

    The divergence is that of its logits from the ``dense`` network's, on images without labels.
    Levels that cost least err by the price / 2 ln 2 for each weight, as Gaussian sources do (Cover
    and Thomas, Elements of Information Theory, 10.3). What noise of that size does to the logits is
    measured; it grows in proportion.
    """
    generator = torch.Generator().manual_seed(0)

    def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
        value = network.compute(operation, inputs)
        if operation.is_layer:
            weights = network.layers[operation.name].weight.numel()
            share = 1e-6 * TRIED_PRICE * weights * _relative_price(weights) / (2 * math.log(2))
            variance = value.transpose(0, 1).flatten(1).var(1, correction=0).mean()
            noise = torch.randn(value.shape, generator=generator)
            value = value + noise * (share * variance).sqrt()
        return value

    lost = added = 0.0
    for batch, _ in images.batches(BATCH_SIZE):
        noisy = evaluate(
            network.graph, compute, {network.graph.input: batch}, [network.graph.output]
        )
        logits = network(batch)
        lost += _divergence(logits, dense(batch))
        added += _divergence(noisy[network.graph.output], logits)
    left = max(nats - lost / len(images), LEAST_SHARE * nats)
    return TRIED_PRICE * left * len(images) / (NOISE_RATIO * max(added, 1e-9))


def _divergence(logits: torch.Tensor, expected: torch.Tensor) -> float:
    given, wanted = logits.log_softmax(1), expected.log_softmax(1)
    return float(F.kl_div(given, wanted, reduction="sum", log_target=True))


def _relative_price(weights: int) -> float:
    """Return the price of a bit in a layer of so many weights, over that in a large one."""
    return (weights / REFERENCE_SIZE) ** (SIZE_POWER - 1)


def _code(
    network: Network, operation: Operation, draw: Callable[[], Iterator[sampling.Samples]],
    price: float,
) -> Int8Layer:  # fmt: skip
    """Code one layer, at most ``MAX_COLUMNS`` of its inputs at a time; ``draw`` yields samples."""
    layer = network.layers[operation.name]
    kernel = layer.weight[0, 0].numel()
    weight, bias, steps = layer.weight.flatten(1).clone(), layer.bias, None
    levels = torch.empty_like(weight, dtype=torch.int8)
    price *= _relative_price(weight.numel())
    width = max(1, regression.MAX_COLUMNS // kernel) * kernel
    for start in range(0, weight.shape[1], width):
        part = slice(start, start + width)
        others = weight.clone()
        others[:, part] = 0
        some = Layer(weight[:, part], bias)
        moments = regression.measure_moments(
            some,
            operation.attributes.get("groups", 1),
            partial(_samples_of_part, draw, others, part),
            repair_ridge,
            sampling.active_range(network, operation.name),
        )
        levels[:, part], steps, bias = fit_and_choose(some, moments, price, kernel, steps)
        weight[:, part] = levels[:, part] * steps[:, None]
    bias = bias.half().float()
    if not bias.isfinite().all():
        raise UserError(TOO_LARGE)
    return Int8Layer(levels.view_as(layer.weight), steps, bias)


def _samples_of_part(
    draw: Callable[[], Iterator[sampling.Samples]], others: torch.Tensor, part: slice
) -> Iterator[sampling.Samples]:
    """Yield samples of ``part`` of a layer's inputs, to be fitted with the others as they are.

    ``others`` are the layer's weights, (O, columns), with zeros in this part.
    """
    has_others = bool(others.any())
    for rows, wanted, added in draw():
        given = sampling.outputs_of(rows, others) if has_others else 0.0
        yield sampling.Samples(rows[:, :, part], wanted - given, added + given)


def layers_on_the_image(graph: Graph) -> set[str]:
    """Return the names of the layers that read the image and no other layer's outputs.

    They have few weights and the whole network depends on them: on ResNet18 the first one, coded
    in fewer than 8 bits, cost four points.
    """
    readers = (reader for name in graph.layers for reader in graph.users[name])
    return set(graph.layers) - graph.affected_by(readers)
