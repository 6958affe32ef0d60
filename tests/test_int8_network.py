"""The plan of an INT8 network: what is fused, what is kept in uint8, what runs in FP32."""

from __future__ import annotations

import pytest
import torch
from every_kind import make_every_kind, make_images
from torch import nn

from common.network.tracing import trace_network
from quantization.int8.conversion import convert, observe
from quantization.int8.engines.reference import ReferenceRunner
from quantization.int8.fusion import fuse_activations, fuse_additions
from quantization.int8.network import ValueRange
from quantization.settings import Settings


def steps_of(module, shape=(3, 8, 8)):
    return {s.name: s for s in fuse_activations(trace_network(module.eval(), shape).graph)}


def test_clipping_activations_run_in_the_operation_that_they_alone_read():
    steps = steps_of(make_every_kind(), (3, 12, 12))
    fused = {step.operation.name: step.activation for step in steps.values()}
    assert fused["stem"] == "relu6"
    assert fused["norm"] == fused["squeeze"] == fused["hidden"] == "relu"
    assert fused["depthwise"] is fused["excite"] is fused["classify"] is None
    assert "hardswish" in steps


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((x.relu() + x).mean((2, 3)))


def test_an_activation_of_a_value_that_is_read_elsewhere_stands_alone():
    steps = steps_of(ReadTwice())
    assert steps["conv"].activation is None
    assert steps["relu"].operation.kind == "relu"
    assert steps["add"].inputs == ("relu", "conv")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.short, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return self.fc((y + self.short(x)).relu().mean((2, 3)))


def int8(module, fp32_layers=()):
    images = make_images(4)
    network = trace_network(module.eval(), images.shape)
    return convert(observe(network, images, "minmax", 4), Settings(fp32_layers=fp32_layers))


def steps_with_additions(network):
    def can_add(step, added):
        return network.is_int8(step.operation)

    return fuse_additions(network.steps(), network.graph, can_add)


def test_an_addition_is_fused_into_the_last_convolution_that_it_reads():
    network = int8(Residual())
    plain = [step.name for step in network.steps()]
    fused = {step.name: step for step in steps_with_additions(network)}
    assert set(plain) - set(fused) == {"second"}
    total = fused["relu_1"]
    assert (total.operation.name, total.added, total.activation) == ("second", "short", "relu")
    assert total.inputs == ("relu", "short")
    assert {step.added for step in network.steps()} == {None}


@pytest.mark.parametrize("layer", ["second", "short"])
def test_only_an_int8_convolution_can_add(layer):
    steps = steps_with_additions(int8(Residual(), (layer,)))
    (total,) = (step for step in steps if step.added)
    assert {total.operation.name, total.added, layer} == {"second", "short", layer}
    assert total.added == layer


def test_values_are_kept_in_uint8_where_an_integer_operation_gives_or_reads_them():
    assert set(int8(Residual()).ranges) == {
        "x", "relu", "second", "short", "relu_1", "mean", "fc"
    }  # fmt: skip
    mixed = int8(Residual(), ("first", "second", "fc"))
    assert set(mixed.ranges) == {"x", "second", "short", "relu_1", "mean"}


def test_pooling_keeps_the_range_of_its_input():
    ranges = int8(Residual()).ranges
    assert ranges["mean"] == ranges["relu_1"]


def test_what_runs_in_fp32_is_listed_with_the_reason():
    assert ReferenceRunner(int8(Residual())).fp32_operations == {}
    reasons = ReferenceRunner(int8(Residual(), ("first",))).fp32_operations
    assert reasons == {"first": "kept in FP32 to hold the accuracy budget"}
    network = trace_network(make_every_kind(), (3, 12, 12))
    converted = convert(observe(network, make_images(4), "minmax", 4), Settings())
    found = ReferenceRunner(converted).fp32_operations
    assert found == {"norm": "a batch norm that no layer precedes"}


def test_a_range_rounds_to_its_levels():
    kept = ValueRange(0.5, 10)
    assert kept.limits == (-5.0, 122.5)
    values = torch.tensor([-9.0, -0.3, 0.2, 0.3, 400.0])
    assert kept.round(values).tolist() == [-5.0, -0.5, 0.0, 0.5, 122.5]
