"""From an FP32 network to an INT8 one: ranges are observed on images, then weights are rounded.

Quantization is static and made after training: every range is fixed before the first use (Jacob et
al., 2018, https://arxiv.org/abs/1712.05877). Observing takes long, converting does not; so one
observation serves every choice of layers that stay in FP32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from common.command import cli
from common.images.data import ImageSet
from common.network.execution import Layer, Network
from common.network.graph import Operation, evaluate
from quantization.int8.fusion import fuse_activations
from quantization.int8.network import SAME_RANGE, Int8Layer, Int8Network, ValueRange
from quantization.int8.observers import OBSERVERS, SMALLEST_SCALE, MinMaxObserver
from quantization.settings import Settings

LOWEST, HIGHEST = -128, 127  # levels of weights
MAX_BIAS_LEVEL = 2**30  # leaves int32 room for the sum of products


@dataclass(frozen=True)
class Observation:
    """What was seen of an FP32 network's values."""

    network: Network
    # By the name of the step whose value each saw; steps that only move or average levels share
    # their input's.
    observers: Mapping[str, MinMaxObserver]
    images: ImageSet  # calibration images

    def ranges(self, reduce_range: bool) -> dict[str, ValueRange]:
        """Return the range of each step's value."""
        chosen = {o: o.choose_range(reduce_range) for o in set(self.observers.values())}
        return {name: chosen[observer] for name, observer in self.observers.items()}


@torch.inference_mode()
def observe(network: Network, images: ImageSet, observer: str, batch_size: int) -> Observation:
    """Observe the values of an FP32 network on images without labels; a UserError if not finite."""
    observers: dict[str, MinMaxObserver] = {}
    for step in fuse_activations(network.graph):
        shares = step.operation.kind in SAME_RANGE
        observers[step.name] = observers[step.inputs[0]] if shares else OBSERVERS[observer]()

    def compute(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
        value = network.compute(operation, inputs, operation.name in network.overwriting)
        if operation.name in observers:
            observers[operation.name].observe(value)
        return value

    graph = network.graph
    count = math.ceil(len(images) / batch_size)
    for batch, _ in cli.progress(images.batches(batch_size), "calibrate", count):
        observers[graph.input].observe(batch)
        evaluate(graph, compute, {graph.input: batch}, [graph.output])
    return Observation(network, observers, images)


def convert(
    observation: Observation, settings: Settings, coded: Mapping[str, Int8Layer] | None = None
) -> Int8Network:
    """Return the INT8 network of an observed one, with ``coded`` layers or with rounded ones."""
    network, images = observation.network, observation.images
    graph = network.graph
    if coded is None:
        rounded = (name for name in graph.layers if name not in settings.fp32_layers)
        coded = {name: quantize_layer(network.layers[name]) for name in rounded}
    layers = {
        name: coded.get(name) or Int8Layer(layer.weight.detach(), None, layer.bias.detach())
        for name, layer in network.layers.items()
    }
    int8 = Int8Network(
        graph, layers, {}, images.classes, tuple(images.mean), tuple(images.std), settings,
        images.channel_order, images.resize,
    )  # fmt: skip
    ranges, kept = observation.ranges(settings.reduce_range), int8.values_in_uint8()
    ranges = {name: value for name, value in ranges.items() if name in kept}
    layers = {
        name: _fit_bias(layer, ranges, graph[name].inputs[0]) for name, layer in layers.items()
    }
    return replace(int8, layers=layers, ranges=ranges)


def convert_coded(
    network: Network, coded: Mapping[str, Int8Layer], calibration: ImageSet, settings: Settings,
    batch_size: int,
) -> Int8Network:  # fmt: skip
    """Return a network with all of its layers coded; its values are observed with these weights."""
    dense = {name: layer.dense() for name, layer in coded.items()}
    observed = observe(network.with_layers(dense), calibration, settings.observer, batch_size)
    return convert(observed, settings, coded)


def quantize_layer(layer: Layer) -> Int8Layer:
    """Round weights to int8, symmetrically, with one scale for each output channel."""
    weight = layer.weight.detach()
    largest = weight.abs().flatten(1).amax(dim=1)
    scales = (largest / ((HIGHEST - LOWEST) / 2)).clamp_min(SMALLEST_SCALE)
    levels = weight * (1 / scales).view(-1, *[1] * (weight.ndim - 1))
    levels = levels.round_().clamp_(LOWEST, HIGHEST).to(torch.int8)
    return Int8Layer(levels, scales, layer.bias.detach())


def _fit_bias(layer: Int8Layer, ranges: Mapping[str, ValueRange], source: str) -> Int8Layer:
    """Widen the scales of channels whose bias would not fit int32; their weights hardly matter."""
    if not layer.is_int8:
        return layer
    least = layer.bias.abs() / (ranges[source].scale * MAX_BIAS_LEVEL)
    if not (least > layer.scales).any():
        return layer
    scales = torch.maximum(layer.scales, least)
    ratios = (layer.scales / scales).view(-1, *[1] * (layer.weight.ndim - 1))
    weight = (layer.weight * ratios).round_().to(torch.int8)
    return replace(layer, weight=weight, scales=scales)
