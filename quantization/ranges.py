"""The ranges that INT8 has to cover: of the weights, by channel, and of the activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from common.model import ResNet18, prunable_layers
from quantization.conversion import activation_observers
from quantization.quantizers import quantizer_of


@dataclass(frozen=True)
class ActivationRange:
    """The range of one observed activation, and what the observer chose to keep of it."""

    name: str
    seen_min: float
    seen_max: float
    kept_min: float
    kept_max: float


@dataclass(frozen=True)
class ChannelRanges:
    """The largest weight magnitude of each output channel of a layer: its spread over channels."""

    layer: str
    low: float
    median: float
    high: float


def activation_ranges(observed: GraphModule) -> list[ActivationRange]:
    """Return the range of every activation that calibration observed, in network order."""
    ranges, shared = [], set()
    for node, observer in activation_observers(observed):
        if observer in shared:  # pooling and flattening share that of what they read
            continue
        shared.add(observer)
        quantizer = quantizer_of(observer)
        ranges.append(
            ActivationRange(
                name=_producer_name(node.args[0]),
                seen_min=float(observer.min_val),
                seen_max=float(observer.max_val),
                kept_min=(quantizer.quant_min - quantizer.zero_point) * quantizer.scale,
                kept_max=(quantizer.quant_max - quantizer.zero_point) * quantizer.scale,
            )
        )
    return ranges


def weight_ranges(model: ResNet18) -> list[ChannelRanges]:
    """Return the spread of weight ranges over channels, by layer, as INT8 sees it.

    Args:
        model: FP32 with batch-norm folded in.
    """
    ranges = []
    for name, module in prunable_layers(model).items():
        largest = module.weight.detach().abs().flatten(1).amax(dim=1)
        spread = (float(value) for value in (largest.min(), largest.median(), largest.max()))
        ranges.append(ChannelRanges(name, *spread))
    return ranges


def _producer_name(node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    return node.target if node.op == "call_module" else node.name
