"""What results.json says of models and budget, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from common.measure.latency import Timing
from quantization.accuracy.budget import Plan, Step
from quantization.int8 import conversion, engines
from quantization.int8.deploy import Quantized
from quantization.report.results import accuracy_by_class, describe_budget, describe_models
from quantization.settings import Settings
from quantization.steps import OnnxModel

ENGINE = engines.candidate_engines()[0]


def timing(batch_size, median_ms):
    return Timing(batch_size, median_ms, 0.0, 1000 * batch_size / median_ms, 7)


def test_models_are_compared_on_the_same_images(tiny_model, random_images, tmp_path):
    test = random_images(10)  # classes 0 to 9
    fp32 = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])  # 8 right
    int8 = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 8, 0])  # 7 right: loses 6 and 7, gains 8
    onnx = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0, 0])  # 6 right: agrees with INT8 on 9
    loader = conversion.calibrate(tiny_model, [], Settings(ENGINE))
    loader(torch.zeros(1, 3, 32, 32))
    converted = conversion.convert(loader, Settings(ENGINE))
    candidate = Quantized(Settings(ENGINE), None, converted, None, int8)
    paths = [tmp_path / name for name in ("a.pth", "a.torchscript.pt", "a.onnx")]
    for size, path in zip((100, 200, 50), paths, strict=True):
        path.write_bytes(bytes(size))
    timings = {
        "fp32-nchw": [timing(1, 40.0)],
        "fp32": [timing(1, 20.0)],
        ENGINE: [timing(1, 5.0)],
        "int8-onnx": [timing(1, 8.0)],
    }
    found = describe_models(
        tiny_model, fp32, [candidate], {ENGINE: paths[:2]}, OnnxModel(paths[2], None, onnx, 0.9),
        test, timings, 400,
    )  # fmt: skip
    models = found["models"]
    assert found["comparison"] == models[2]["comparison"]
    assert [model["name"] for model in models] == ["fp32-nchw", "fp32", "int8", "int8-onnx"]
    assert [model["accuracy"]["correct"] for model in models] == [8, 8, 7, 6]
    _, best, ours, exported = models
    assert (ours["file"], ours["frozen"], ours["size_bytes"]) == ("a.pth", "a.torchscript.pt", 100)
    assert ours["comparison"]["size_ratio"] == 100 / best["size_bytes"]
    assert ours["comparison"]["size_ratio_given"] == 100 / 400
    assert ours["comparison"]["speedup"] == [{"batch_size": 1, "value": 4.0}]
    assert ours["speedup_over_nchw"] == [{"batch_size": 1, "value": 8.0}]
    accuracy = ours["comparison"]["accuracy"]
    assert (accuracy["only_a_correct"], accuracy["only_b_correct"]) == (2, 1)
    assert accuracy["drop"] == pytest.approx(0.1)
    assert exported["engine"] == "onnxruntime"
    assert exported["agreement"] == pytest.approx(0.9)
    assert exported["comparison"]["accuracy"]["drop"] == pytest.approx(0.2)
    assert len(ours["int8_operations"]) == 31
    assert ours["fp32_operations"] == []


@pytest.mark.parametrize(
    ("held_out_drop", "test_drop", "met"),
    [(0.001, 0.001, True), (0.001, 0.002, False), (0.002, 0.001, False), (-0.001, 0.0, True)],
)
def test_a_budget_is_met_only_if_both_sets_of_images_say_so(held_out_drop, test_drop, met):
    steps = [Step("plain", 0.003, True), Step("conv1 in FP32", held_out_drop, True)]
    plan = Plan(None, Settings(ENGINE, fp32_layers=("conv1",)), held_out_drop, steps)
    comparison = {"accuracy": {"drop": test_drop}}
    results = {"models": [{"name": "int8", "engine": "x86", "comparison": comparison}]}
    assert describe_budget(plan, 0.001, results) == {
        "max_drop": 0.001,
        "met": met,
        "fp32_layers": ["conv1"],
        "held_out_drop": held_out_drop,
        "held_out_engine": ENGINE,
        "test_drop": test_drop,
        "test_engine": "x86",
        "steps": [
            {"action": "plain", "drop": 0.003, "kept": True},
            {"action": "conv1 in FP32", "drop": held_out_drop, "kept": True},
        ],
    }


def test_accuracy_by_class_counts():
    labels = torch.tensor([0, 0, 0, 1, 1])
    fp32, int8 = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1])
    rows = accuracy_by_class(labels, fp32, int8)
    assert rows == [
        {"class": "airplane", "images": 3, "fp32": 2 / 3, "int8": 1.0},
        {"class": "automobile", "images": 2, "fp32": 1.0, "int8": 0.5},
    ]
