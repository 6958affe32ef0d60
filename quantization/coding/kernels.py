"""Coded networks in torch's INT8 kernels, and back: the levels are the INT8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import nn
from torch.fx import GraphModule

from common.images.data import ImageSet, batches
from common.network.coded import CodedLayer, CodedNetwork
from common.network.resnet import ResNet18, prunable_layers
from quantization.int8 import conversion
from quantization.int8.engines import quiet_torch
from quantization.int8.operations import layer_of, round_biases
from quantization.settings import Settings, parse_settings


def from_int8(converted: GraphModule, settings: Settings) -> CodedNetwork:
    """Return the coded form of an INT8 model; nothing is lost.

    Args:
        converted: From :func:`quantization.int8.conversion.convert`.
        settings: How it was made.

    Raises:
        ValueError: A weight is not quantized symmetrically with FP32 scales.
    """
    with torch.device("meta"):
        names = prunable_layers(ResNet18())
    layers = {name: _read_layer(name, layer_of(converted, name)) for name in names}
    scales, zero_points = (
        torch.stack([*_activations(converted.state_dict(), kind).values()])
        for kind in ("scale", "zero_point")
    )
    return CodedNetwork(layers, scales, zero_points, asdict(settings))


def assemble(
    layers: Mapping[str, CodedLayer], calibration: ImageSet, settings: Settings, batch_size: int
) -> CodedNetwork:
    """Return coded layers as a network, its activations' ranges calibrated.

    Args:
        layers: All in INT8.
        calibration: Images, whose labels are not used.
        settings: How to calibrate, and the engine to run on.
        batch_size: In images.
    """
    with torch.device("meta"):  # the file's order
        layers = {name: layers[name] for name in prunable_layers(ResNet18())}
    weights = CodedNetwork(layers, torch.empty(0), torch.empty(0), {})
    model = ResNet18(weights.widths).eval()
    model.load_state_dict(weights.state_dict())
    observed = conversion.calibrate(model, batches(calibration, batch_size), settings)
    return replace(from_int8(conversion.convert(observed, settings), settings), layers=layers)


def to_int8(network: CodedNetwork) -> tuple[GraphModule, Settings]:
    """Return the INT8 model of a coded network, and the settings to deploy it with.

    Its biases are rounded as :func:`quantization.int8.conversion.convert` rounds them.

    Raises:
        ValueError: The network has too few activations, or settings that it was not made with.
        UserError: torch has no such engine on this CPU.
    """
    settings = parse_settings(dict(network.settings))
    if {name for name, layer in network.layers.items() if not layer.is_int8} != {
        *settings.fp32_layers
    }:
        raise ValueError("other layers are in FP32 than the settings say")
    model = conversion.build_skeleton(settings, network.widths)
    state = model.state_dict()  # carries the versions that torch's modules ask for
    state |= zip(_activations(state, "scale"), network.activation_scales, strict=True)
    state |= zip(_activations(state, "zero_point"), network.activation_zero_points, strict=True)
    with quiet_torch(settings.engine):
        model.load_state_dict(state)
        for name, layer in network.layers.items():
            _fill_layer(layer_of(model, name), layer)
        round_biases(model)
    return model, settings


def _activations(state: Mapping[str, object], kind: str) -> dict[str, torch.Tensor]:
    """Return each ``scale`` or ``zero_point`` in the order of the state: that of the coded file."""
    ends = (f".{kind}", f"_{kind}_0")
    return {name: value for name, value in state.items() if name.endswith(ends)}


def _read_layer(name: str, module: nn.Module) -> CodedLayer:
    if not hasattr(module, "set_weight_bias"):  # kept in FP32
        weight, bias = module.weight.detach(), module.bias.detach()
        return CodedLayer(weight, torch.ones_like(bias), bias)
    weight, bias = module.weight(), module.bias().detach()
    scales = weight.q_per_channel_scales()
    if weight.q_per_channel_zero_points().any() or (scales.float() != scales).any():
        raise ValueError(f"{name} is not quantized symmetrically with FP32 scales")
    return CodedLayer(weight.int_repr(), scales.float(), bias)


@torch.no_grad()
def _fill_layer(module: nn.Module, layer: CodedLayer) -> None:
    if not layer.is_int8:
        module.weight.copy_(layer.weight)
        module.bias.copy_(layer.bias)
        return
    zero_points = torch.zeros(len(layer.scales), dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(
        layer.weight, layer.scales.double(), zero_points, axis=0
    )
    module.set_weight_bias(weight, layer.bias)
