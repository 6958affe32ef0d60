"""Zeros through quantization: counted apart from the code that is tested, on every way to INT8."""

from __future__ import annotations

import pytest
import torch

from common.images.data import batches
from quantization.accuracy import corrections
from quantization.files import sparsity
from quantization.int8 import conversion, engines
from quantization.settings import Settings

ENGINES = engines.candidate_engines()


def quantize(model, images, settings):
    return conversion.convert(conversion.calibrate(model, batches(images, 16), settings), settings)


CORRECTIONS = {
    "none": lambda model, images: model,
    "equalised": lambda model, images: corrections.equalize_cross_layer(model),
    "biases": lambda model, images: corrections.correct_biases(model, images, 16),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    "fp32_layers", [(), ("layer1.0.conv2", "linear"), ("conv1", "layer2.0.conv1")]
)
def test_every_zero_stays_a_zero(pruned_model, random_images, engine, correction, fp32_layers):
    images = random_images(32)
    settings = Settings(engine, observer="minmax", fp32_layers=fp32_layers)
    corrected = CORRECTIONS[correction](pruned_model, images)
    converted = quantize(corrected, images, settings)
    total = zeros = 0
    for name, weight in pruned_model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or weight.ndim == 1:
            continue
        module = converted.get_submodule(layer)
        after = (module[0] if isinstance(module, torch.nn.Sequential) else module).weight
        after = after if isinstance(after, torch.Tensor) else after().dequantize()
        assert (after[weight == 0] == 0).all()
        total += weight.numel()
        zeros += int((weight == 0).sum())
    counted = sparsity.count_zeros(pruned_model, converted)
    assert counted["weights"] == total
    assert counted["zeros_before"] == zeros
    assert counted["zeros_after"] >= zeros


def test_a_lost_zero_is_a_bug(pruned_model, random_images):
    converted = quantize(pruned_model, random_images(32), Settings(ENGINES[0], observer="minmax"))
    with torch.no_grad():
        weight = pruned_model.conv1.weight
        weight[weight.abs() == weight.abs().max()] = 0
    with pytest.raises(AssertionError, match="conv1: 1 zeros"):
        sparsity.count_zeros(pruned_model, converted)
