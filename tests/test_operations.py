"""What a converted model runs in INT8, and its rounded biases."""

from __future__ import annotations

import pytest
import torch

from quantization.int8 import conversion, engines
from quantization.int8.operations import list_operations
from quantization.settings import Settings

ENGINE = engines.candidate_engines()[0]


@pytest.fixture
def observed(calibrate):
    return calibrate(Settings())


def test_every_operation_is_int8(observed):
    operations = list_operations(conversion.convert(observed, Settings(ENGINE)))
    assert all(operations.values())
    # 20 convolutions, 8 additions, pooling, flattening, the linear layer.
    assert len(operations) == 31


def test_biases_are_multiples_of_the_steps_of_the_sums(observed):
    converted = conversion.convert(observed, Settings(ENGINE))
    scales = {"conv1": converted.conv1_input_scale_0.item()}
    scales["layer1.0.conv1"] = converted.get_submodule("conv1").scale
    scales["layer1.0.conv2"] = converted.get_submodule("layer1.0.conv1").scale
    for name, scale in scales.items():
        layer = converted.get_submodule(name)
        multiples = layer.bias().double() / (scale * layer.weight().q_per_channel_scales())
        assert torch.allclose(multiples, multiples.round(), rtol=0, atol=0.01), name
        assert multiples.abs().max() > 10, name
