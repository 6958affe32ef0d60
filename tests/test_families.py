"""Eleven families of torchvision, each traced once: values, shapes, multiply-adds and the scan."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torchvision
from test_tracing import with_statistics
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.network.branching import branch_logits, start_values
from common.network.execution import Network
from common.network.size import describe_layers
from common.network.tracing import trace_network, weight_layers
from pruning.alone.brute_force import pruned_copy
from pruning.masks import l1_masks, masked_layers

FAMILIES = (
    "resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "mobilenet_v3_small", "efficientnet_b0",
    "densenet121", "regnet_y_400mf", "googlenet", "squeezenet1_1", "shufflenet_v2_x1_0",
)  # fmt: skip
LARGE = ("resnet50", "vgg11_bn", "densenet121", "googlenet")
SHAPE = (3, 67, 75)  # divides by no stride


@dataclass(frozen=True)
class Family:
    model: nn.Module
    network: Network
    images: torch.Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    options = {"init_weights": False} if request.param == "googlenet" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(request.param, weights=None, num_classes=5, **options)
        model = with_statistics(model)
        images = torch.randn(2, *SHAPE)
    return Family(model, trace_network(model, SHAPE), images)


def test_network_computes_what_the_module_does_and_its_shapes_are_inferred(family):
    graph = family.network.graph
    names = [operation.name for operation in graph.operations]
    with torch.inference_mode():
        expected = family.model(family.images)
        values = family.network.run({graph.input: family.images}, names)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(values[graph.output], expected, rtol=1e-4, atol=tolerance)
    shapes = {name: tuple(value.shape[1:]) for name, value in values.items()}
    assert family.network.shapes == shapes


def test_multiply_adds_are_those_that_torch_counts(family):
    """Grouped and depthwise convolutions, too; torch counts two operations for each."""
    model, network = family.model, family.network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(family.images[:1])
    assert 2 * sum(network.macs.values()) == counter.get_total_flops()
    layers = describe_layers(model, network)
    assert sum(layer["macs"] for layer in layers) == sum(network.macs.values())
    state = [key.removesuffix(".weight") for key in model.state_dict()]
    names = [layer["name"] for layer in layers]
    assert names == [key for key in state if key in set(names)]
    shapes = [list(model.get_submodule(name).weight.shape) for name in names]
    assert [layer["shape"] for layer in layers] == shapes


@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=[pytest.mark.full] * (n in LARGE)) for n in FAMILIES],
    indirect=True,
)
def test_scan_is_exact(family):
    """Against one pass of the module for each layer, pruned by torch."""
    model, network, images = family.model, family.network, family.images
    weights = {n: m.weight.detach() for n, m in weight_layers(model, network).items()}
    some = [*list(weights)[:: 1 + len(weights) // 8], list(weights)[-1]]
    with torch.inference_mode():
        variants = masked_layers(network, l1_masks(weights, 0.9))
        wanted = start_values(network.graph, weights)
        dense = network.run({network.graph.input: images}, wanted)
        found = branch_logits(network, dense, variants).view(len(weights), 2, 5)
        by_layer = dict(zip(weights, found, strict=True))
        expected = torch.stack([pruned_copy(model, {layer: 0.9})(images) for layer in some])
    found = torch.stack([by_layer[layer] for layer in some])
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * scale)
    best = expected.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4 * scale
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])
