"""What results.json says of models and budget, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from common.inputs import Inputs
from common.measure.evaluate import compare, measure_accuracy
from common.measure.latency import Timing
from common.network.execution import Layer
from common.network.tracing import trace_network
from common.search.budget import Verdict
from quantization.accuracy import corrections
from quantization.accuracy.budget import Attempt, Plan
from quantization.int8 import engines
from quantization.int8.conversion import convert as convert_network
from quantization.int8.conversion import observe as observe_network
from quantization.report.results import (
    accuracy_by_class,
    describe_budget,
    describe_models,
    describe_sparsity,
    fastest_engines,
)
from quantization.settings import Settings
from quantization.steps import OnnxModel, Quantized

ENGINE = engines.candidate_engines()[0]


def timing(batch_size, median_ms):
    return Timing(batch_size, median_ms, 0.0, 1000 * batch_size / median_ms, 7)


def test_models_are_compared_on_the_same_images(tiny_model, convert, random_images, tmp_path):
    test = random_images(10)  # classes 0 to 9
    fp32 = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])  # 8 right
    int8 = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 8, 0])  # 7 right: loses 6 and 7, gains 8
    onnx = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0, 0])  # 6 right
    network = convert(Settings(ENGINE))
    candidate = Quantized(None, engines.runner(ENGINE, network), int8, Settings(ENGINE))
    paths = [tmp_path / name for name in ("a.safetensors", "a.onnx")]
    for size, path in zip((100, 50), paths, strict=True):
        path.write_bytes(bytes(size))
    timings = {
        "fp32-nchw": [timing(1, 40.0)],
        "fp32": [timing(1, 20.0)],
        ENGINE: [timing(1, 5.0)],
        "int8-onnx": [timing(1, 8.0)],
    }
    inputs = Inputs({"size_bytes": 400}, tiny_model, None, 0, test, None)
    exported = OnnxModel(paths[1], None, onnx, 0.7)  # with another model than the headline
    found = describe_models(inputs, fp32, [candidate], {ENGINE: paths[0]}, exported, timings)
    models = found["models"]
    assert found["comparison"] == models[2]["comparison"]
    assert [model["name"] for model in models] == ["fp32-nchw", "fp32", "int8", "int8-onnx"]
    assert [model["accuracy"]["correct"] for model in models] == [8, 8, 7, 6]
    _, best, ours, exported = models
    assert (ours["file"], ours["size_bytes"]) == ("a.safetensors", 100)
    assert ours["comparison"]["size_ratio"] == 100 / best["size_bytes"]
    assert ours["comparison"]["size_ratio_given"] == 100 / 400
    assert ours["comparison"]["speedup"] == [{"batch_size": 1, "value": 4.0, "noisy": False}]
    assert ours["speedup_over_nchw"] == [{"batch_size": 1, "value": 8.0, "noisy": False}]
    accuracy = ours["comparison"]["accuracy"]
    assert (accuracy["only_a_correct"], accuracy["only_b_correct"]) == (2, 1)
    assert accuracy["drop"] == pytest.approx(0.1)
    assert exported["engine"] == "onnxruntime"
    assert exported["agreement"] == 0.7
    assert exported["comparison"]["accuracy"]["drop"] == pytest.approx(0.2)
    assert len(ours["int8_operations"]) == 31
    assert ours["fp32_operations"] == []


def test_the_fastest_engine_of_each_batch_size():
    timings = {"a": [timing(1, 2.0), timing(4, 1.0)], "b": [timing(1, 1.0), timing(4, 2.0)]}
    assert fastest_engines(timings) == [
        {"batch_size": 1, "engine": "b", "noisy": False},
        {"batch_size": 4, "engine": "a", "noisy": False},
    ]


@pytest.mark.parametrize(
    ("lost", "spare", "test_drop", "met"),
    [(1, 0.0, 0.001, True), (1, 0.0, 0.002, False), (1, -0.0005, 0.001, False)],
)
def test_a_budget_is_met_only_if_both_sets_of_images_say_so(lost, spare, test_drop, met):
    dense = torch.ones(1000, dtype=torch.bool)
    correct = torch.arange(1000) >= lost
    verdict = Verdict(measure_accuracy(correct), compare(dense, correct), spare)
    steps = [Attempt("plain", 0.003, -0.003, True), Attempt.of("conv1 in FP32", verdict, True)]
    plan = Plan(None, Settings(ENGINE, fp32_layers=("conv1",)), verdict, steps)
    comparison = {"accuracy": {"drop": test_drop}}
    results = {"models": [{"name": "int8", "engine": "x86", "comparison": comparison}]}
    assert describe_budget(plan, 0.001, results) == {
        "max_drop": 0.001,
        "met": met,
        "fp32_layers": ["conv1"],
        "held_out_images": 1000,
        "held_out_drop": 0.001,
        "held_out_spare": spare,
        "held_out_engine": ENGINE,
        "test_drop": test_drop,
        "test_engine": "x86",
        "steps": [
            {"action": "plain", "drop": 0.003, "spare": -0.003, "kept": True},
            {"action": "conv1 in FP32", "drop": 0.001, "spare": spare, "kept": True},
        ],
    }


def test_accuracy_by_class_counts(random_images):
    test = random_images(3).rows(torch.tensor([0, 0, 0, 1, 1]))
    rows = accuracy_by_class(test, torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 1]))
    assert rows == [
        {"class": "airplane", "images": 3, "fp32": 1 / 3, "int8": 2 / 3},
        {"class": "automobile", "images": 2, "fp32": 1.0, "int8": 0.5},
    ]


CORRECTIONS = {
    "none": lambda network, images: network,
    "equalised": lambda network, images: corrections.equalize_cross_layer(network),
    "biases": lambda network, images: corrections.correct_biases(network, images, 16),
}


@pytest.fixture
def pruned_network(pruned_model):
    return trace_network(pruned_model, (3, 32, 32))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("fp32_layers", [(), ("layer1.0.conv2", "linear")])
def test_every_zero_stays_a_zero(pruned_network, random_images, correction, fp32_layers):
    images = random_images(32)
    corrected = CORRECTIONS[correction](pruned_network, images)
    observation = observe_network(corrected, images, "minmax", 16)
    int8 = convert_network(observation, Settings(ENGINE, fp32_layers=fp32_layers))
    weights = [pruned_network.layers[name].weight for name in pruned_network.graph.layers]
    counted = describe_sparsity(pruned_network, int8)["sparsity"]
    assert counted["weights"] == sum(weight.numel() for weight in weights)
    assert counted["zeros_before"] == sum(int((weight == 0).sum()) for weight in weights)
    assert counted["zeros_after"] >= counted["zeros_before"]


def test_a_lost_zero_is_a_bug(pruned_network, random_images):
    int8 = convert_network(
        observe_network(pruned_network, random_images(8), "minmax", 8), Settings(ENGINE)
    )
    layer = pruned_network.layers["conv1"]
    weight = layer.weight.clone()
    weight[weight.abs() == weight.abs().max()] = 0
    changed = pruned_network.with_layers({"conv1": Layer(weight, layer.bias)})
    with pytest.raises(AssertionError, match="conv1: 1 zeros"):
        describe_sparsity(changed, int8)


def test_a_network_that_was_not_pruned_is_not_called_so(tiny_network, convert):
    assert describe_sparsity(tiny_network, convert(Settings(ENGINE))) == {}
