"""Accuracy costs by layer: scans that share work against whole forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.network.cascade import Fp32Recheck
from common.network.graph import evaluate
from quantization.accuracy import diagnosis
from quantization.int8 import engines
from quantization.int8.conversion import convert, quantize_layer
from quantization.int8.fusion import fuse_activations

SETTINGS = engines.choose_settings(engines.candidate_engines()[0])


@pytest.mark.parametrize("fast", [False, True])
@torch.inference_mode()
def test_only_quantized_equals_whole_forward_passes(
    tiny_network, observe, random_images, monkeypatch, fast
):
    monkeypatch.setattr(diagnosis, "bf16_pays", lambda: fast)
    test, graph = random_images(24, seed=2), tiny_network.graph
    ranges = observe(SETTINGS).ranges(SETTINGS.reduce_range)
    dense, alone = diagnosis.scan_only_quantized(tiny_network, ranges, test, Fp32Recheck())
    x = test.normalize(test.images)
    assert torch.equal(dense, tiny_network(x).argmax(dim=1) == test.labels)
    assert list(alone) == list(graph.layers)
    steps = {step.operation.name: step for step in fuse_activations(graph)}
    for name in graph.layers:
        step, layer = steps[name], tiny_network.layers[name]
        rounded = quantize_layer(layer).dense()

        def compute(operation, inputs, name=name, step=step, rounded=rounded):
            if operation.name != name:
                return tiny_network.compute(operation, inputs)
            value = ranges[step.inputs[0]].round(inputs[0])
            return ranges[step.name].round(tiny_network.compute(operation, [value], layer=rounded))

        logits = evaluate(graph, compute, {graph.input: x}, [graph.output])[graph.output]
        assert int(((logits.argmax(1) == test.labels) != alone[name]).sum()) <= 1, name


def test_only_fp32_is_the_network_converted_so(observe, random_images):
    test, observation = random_images(24, seed=2), observe(SETTINGS)
    alone = diagnosis.scan_only_fp32(observation, SETTINGS, test, batch_size=10)
    assert list(alone) == list(observation.network.graph.layers)
    mixed = convert(observation, replace(SETTINGS, fp32_layers=("layer1.0.conv2",)))
    logits = engines.runner(SETTINGS.engine, mixed)(test.normalize(test.images))
    expected = logits.argmax(dim=1) == test.labels
    assert int((alone["layer1.0.conv2"] != expected).sum()) <= 1  # FP32 rounds by batch size
