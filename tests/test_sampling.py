"""What a layer reads and should give at positions, against convolutions and unfolding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import Bottleneck, MobileNet, build

from common.fitting import sampling
from common.fitting.sampling import (
    Samples,
    active_range,
    completed_sum,
    draw_positions,
    inputs_at,
    outputs_at,
)
from common.network.execution import Layer
from common.network.graph import CONVOLUTION, LINEAR, Operation
from common.network.tracing import trace_network

CONVOLUTIONS = [
    # kernel, stride, padding, dilation, groups
    ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((5, 3), (1, 2), (2, 0), (1, 1), 2),
    ((3, 3), (1, 1), (2, 4), (2, 3), 4),
    ((7, 7), (2, 2), (3, 3), (1, 1), 1),
]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def convolution(generator, kernel, stride, padding, dilation, groups):
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator)
    layer = Layer(weight, torch.randn(8, generator=generator))
    return Operation("c", CONVOLUTION, ("x",), attributes), layer


def run(operation, layer, x):
    a = operation.attributes
    return F.conv2d(
        x, layer.weight, layer.bias, a["stride"], a["padding"], a["dilation"], a["groups"]
    )


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_inputs_are_what_a_convolution_reads(generator, settings):
    operation, layer = convolution(generator, *settings)
    groups = settings[-1]
    x = torch.randn(3, 4, 11, 9, generator=generator)
    y = run(operation, layer, x)
    positions = draw_positions(y.shape, 5, generator)
    rows = inputs_at(operation, layer, x, positions)
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    found = torch.einsum("ngc,goc->ngo", rows, weight).flatten(1) + layer.bias
    torch.testing.assert_close(found, outputs_at(y, positions), rtol=1e-4, atol=1e-4)
    # All positions in order are torch's own unfolding.
    total = y.shape[2] * y.shape[3]
    everywhere = torch.arange(total).expand(len(x), total)
    kernel, stride, padding, dilation, _ = settings
    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    assert torch.equal(inputs_at(operation, layer, x, everywhere).flatten(1), unfolded)


def test_positions_are_distinct_and_no_more_than_there_are(generator):
    positions = draw_positions((4, 2, 3, 5), 8, generator)
    assert positions.shape == (4, 8)
    assert all(len(set(row)) == 8 and max(row) < 15 for row in positions.tolist())
    assert draw_positions((4, 2, 2, 2), 8, generator).shape == (4, 4)
    assert draw_positions((4, 2), 8, generator) is None


def test_all_of_a_linear_layers_inputs_are_read(generator):
    operation, layer = Operation("l", LINEAR, ("x",)), Layer(torch.ones(2, 5), torch.zeros(2))
    x = torch.randn(3, 5, generator=generator)
    assert torch.equal(inputs_at(operation, layer, x, None)[:, 0], x)


def test_the_last_operand_completes_a_sum(random_images):
    images = random_images(8)
    network = trace_network(build(Bottleneck, images), images.shape)
    addition, other = completed_sum(network, "conv3")
    assert (network.graph[addition].kind, other) == ("add", "down.0")
    assert completed_sum(network, "down.0") == ("down.0", None)
    assert completed_sum(network, "conv1") == ("conv1", None)
    mobile = trace_network(build(MobileNet, images), images.shape)
    assert completed_sum(mobile, "blocks.0.project.0")[1] == "stem.0"
    assert completed_sum(mobile, "blocks.1.project.0") == ("blocks.1.project.0", None)


def test_outputs_count_where_the_activation_after_them_is_not_flat(random_images):
    images = random_images(8)
    network = trace_network(build(Bottleneck, images), images.shape)
    found = {name: active_range(network, name) for name in network.layers}
    relu = (0.0, float("inf"))
    # The shortcut "down.0" runs before conv3, which completes the sum; nothing follows "fc".
    no_range = {"down.0": None, "fc": None}
    assert found == dict.fromkeys(("stem.0", "conv1", "conv2", "conv3"), relu) | no_range
    mobile = trace_network(build(MobileNet, images), images.shape)
    assert active_range(mobile, "blocks.0.expand.0") == (0, 6)
    assert active_range(mobile, "blocks.0.filter.0") == (-3, float("inf"))
    assert active_range(mobile, "blocks.0.project.0") is None  # its sum is read as it is
    for name, function in (
        ("relu", F.relu), ("relu6", F.relu6), ("hardswish", F.hardswish),
        ("hardsigmoid", F.hardsigmoid),
    ):  # fmt: skip
        low, high = sampling.ACTIVE_RANGES[name]
        beyond = torch.tensor([low - 5, low - 0.01, low])
        assert function(beyond).unique().numel() == 1
        if high < float("inf"):
            assert function(torch.tensor([high, high + 0.01, high + 5])).unique().numel() == 1


def test_relaxed_targets_differ_where_the_activation_is_flat():
    """By hand, for ReLU6, with 1 added to each output."""
    wanted = torch.tensor([[-4.0, -4.0, 2.0, 7.0, 7.0]])
    given = torch.tensor([[-3.0, 5.0, -8.0, 9.0, 3.0]])  # all from the bias
    samples = Samples(torch.zeros(1, 1, 2), wanted, torch.ones(1, 5))
    relaxed = samples.relaxed(Layer(torch.zeros(5, 2), given[0]), (0.0, 6.0))
    assert relaxed.wanted.tolist() == [[-3.0, -1.0, 2.0, 9.0, 5.0]]
