"""Accuracy costs by layer: scans that share work against whole forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantization.accuracy.quantizers import layer_quantizers, quantize_weight
from torch.fx import Interpreter

from common.images.data import normalize
from common.network.cascade import Fp32Recheck
from common.network.resnet import fold_batch_norm, prunable_layers
from quantization.accuracy import layer_cost
from quantization.int8 import conversion, engines

SETTINGS = engines.choose_settings(engines.candidate_engines()[0])


@pytest.fixture
def observed(calibrate):
    return calibrate(SETTINGS)


@pytest.mark.parametrize("fast", [False, True])
@torch.inference_mode()
def test_only_quantized_equals_whole_forward_passes(
    tiny_model, observed, random_images, monkeypatch, fast
):
    monkeypatch.setattr(layer_cost, "bf16_pays", lambda: fast)
    test = random_images(24, seed=2)
    dense, alone = layer_cost.scan_only_quantized(tiny_model, observed, test, Fp32Recheck())
    x = normalize(test.images)
    assert torch.equal(dense, tiny_model(x).argmax(dim=1) == test.labels)
    quantizers = layer_quantizers(observed)
    assert list(alone) == list(quantizers)
    for name, (read, write) in quantizers.items():
        whole = fold_batch_norm(tiny_model)
        layer = whole.get_submodule(name)
        layer.weight = torch.nn.Parameter(quantize_weight(layer.weight))
        layer.register_forward_pre_hook(lambda _, args, read=read: (read(args[0]),))
        layer.register_forward_hook(lambda _, args, y, write=write: write(y))
        correct = whole(x).argmax(dim=1) == test.labels
        assert int((correct != alone[name]).sum()) <= 1, name


@torch.inference_mode()
def test_only_fp32_equals_whole_forward_passes(tiny_model, observed, random_images):
    test = random_images(24, seed=2)
    alone = layer_cost.scan_only_fp32(tiny_model, observed, SETTINGS, test, batch_size=10)
    assert list(alone) == list(layer_quantizers(observed))
    for name, correct in alone.items():
        exempt = replace(SETTINGS, fp32_layers=(name,))
        whole = conversion.convert(conversion.reuse_ranges(observed, tiny_model, exempt), exempt)
        expected = whole(normalize(test.images)).argmax(dim=1) == test.labels
        assert int((correct != expected).sum()) <= 1, name  # FP32 rounds by batch size


@torch.inference_mode()
def test_only_fp32_gives_the_logits_of_a_network_converted_so(tiny_model, observed, random_images):
    images = normalize(random_images(24, seed=2).images)
    converted = conversion.convert(observed, SETTINGS)
    int8 = Interpreter(converted, garbage_collect_values=False)
    all_int8 = int8.run(images)
    folded = prunable_layers(fold_batch_norm(tiny_model))
    found = layer_cost.logits_by_layer(int8.env, Interpreter(converted), folded)
    assert list(found) == list(folded)
    for name, logits in found.items():
        exempt = replace(SETTINGS, fp32_layers=(name,))
        whole = conversion.convert(conversion.reuse_ranges(observed, tiny_model, exempt), exempt)
        expected = whole(images)
        apart, undone = (logits - expected).abs().mean(), (all_int8 - expected).abs().mean()
        if name == "conv1":  # which reads the rounded image here, the image itself there
            assert not torch.equal(logits, all_int8)
        else:
            assert apart < 0.1 * undone, name
