"""The steps of quantization.py, on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common import evaluate
from common.cli import UserError
from common.latency import Timing
from common.model import ResNet18
from quantization import artifact, conversion, deploy, engines, experiment
from quantization.experiment import OnnxModel, Quantized
from quantization.settings import Settings

ENGINES = engines.candidate_engines()


@pytest.fixture(autouse=True)
def _keep_engine():
    engine = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = engine


def timing(batch_size, median_ms):
    return Timing(batch_size, median_ms, 0.0, 1000 * batch_size / median_ms, 7)


def quantized_with(engine, predictions=None):
    return Quantized(Settings(engine), None, None, None, predictions)


def test_engines_with_the_same_ranges_are_calibrated_once(tiny_model, random_images, monkeypatch):
    calls = []
    calibrate = conversion.calibrate
    monkeypatch.setattr(
        conversion, "calibrate", lambda *arguments: calls.append(1) or calibrate(*arguments)
    )
    settings = [Settings(engine) for engine in ENGINES]
    settings.append(Settings(ENGINES[0], observer="minmax"))
    test = random_images(24, seed=1)
    quantized = experiment.quantize(tiny_model, random_images(32), test, settings, 16)
    assert len(calls) == 2
    assert [candidate.settings for candidate in quantized] == settings
    for candidate in quantized:
        assert torch.equal(
            candidate.predictions, evaluate.predict(candidate.deployed, test, 16, "again")
        )


def test_the_fastest_comes_first_by_the_geometric_mean():
    timings = {
        "steady": [timing(1, 2.0), timing(128, 200.0)],  # √400
        "bulky": [timing(1, 5.0), timing(128, 100.0)],  # √500
        "quick": [timing(1, 1.0), timing(128, 300.0)],  # √300
    }
    candidates = [quantized_with(name) for name in timings]
    order = [c.settings.engine for c in experiment.fastest_first(candidates, timings)]
    assert order == ["quick", "steady", "bulky"]


def test_both_files_are_verified_and_a_difference_is_an_error(
    tiny_model, random_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(conversion, "ResNet18", lambda: ResNet18(stage_channels=(4, 8, 8, 8)))
    test = random_images(8)
    (candidate,) = experiment.quantize(tiny_model, test, test, [Settings(ENGINES[0])], 8)
    reload = artifact._run_saved
    monkeypatch.setattr(  # in this process: a fresh one does not know the tiny model
        artifact,
        "logits_in_fresh_process",
        lambda path, images, threads: torch.from_numpy(reload(path, images.numpy(), threads)),
    )
    path = tmp_path / "model.pth"
    paths = experiment.save_and_verify(candidate, path, test)
    names = ["model.pth", "model.torchscript.pt"] if deploy.CAN_FREEZE else ["model.pth"]
    assert [p.name for p in paths] == names
    assert all(p.stat().st_size for p in paths)

    with engines.quiet_torch(ENGINES[0]):
        layer = candidate.model.get_submodule("linear")
        layer.set_weight_bias(layer.weight(), layer.bias() + 1)  # not what deployed computes
    with pytest.raises(UserError, match=r"model\.pth: reloaded logits differ by up to"):
        experiment.save_and_verify(replace(candidate, deployed=candidate.deployed), path, test)


def test_models_are_compared_on_the_same_images(tiny_model, random_images, tmp_path):
    test = random_images(10)  # classes 0 to 9
    fp32 = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])  # 8 right
    int8 = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 8, 0])  # 7 right: loses 6 and 7, gains 8
    onnx = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0, 0])  # 6 right: agrees with INT8 on 9
    loader = conversion.calibrate(tiny_model, [], Settings(ENGINES[0]))
    loader(torch.zeros(1, 3, 32, 32))
    converted = conversion.convert(loader, Settings(ENGINES[0]))
    candidate = replace(quantized_with(ENGINES[0], int8), model=converted)
    paths = [tmp_path / name for name in ("a.pth", "a.torchscript.pt", "a.onnx")]
    for size, path in zip((100, 200, 50), paths, strict=True):
        path.write_bytes(bytes(size))
    timings = {
        "fp32-nchw": [timing(1, 40.0)],
        "fp32": [timing(1, 20.0)],
        ENGINES[0]: [timing(1, 5.0)],
        "int8-onnx": [timing(1, 8.0)],
    }
    models = experiment.describe_models(
        tiny_model, fp32, [candidate], {ENGINES[0]: paths[:2]}, OnnxModel(paths[2], None, onnx),
        test, timings,
    )  # fmt: skip
    assert [model["name"] for model in models] == ["fp32-nchw", "fp32", "int8", "int8-onnx"]
    assert [model["accuracy"]["correct"] for model in models] == [8, 8, 7, 6]
    _, best, ours, exported = models
    assert (ours["file"], ours["frozen"], ours["size_bytes"]) == ("a.pth", "a.torchscript.pt", 100)
    assert ours["comparison"]["size_ratio"] == 100 / best["size_bytes"]
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
