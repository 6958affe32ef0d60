"""The steps of quantization.py, on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common import evaluate
from common.cli import UserError
from common.latency import Timing
from quantization import artifact, conversion, deploy, engines, experiment
from quantization.experiment import Quantized
from quantization.settings import Settings

ENGINES = engines.candidate_engines()


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
    tiny_model, tiny_skeleton, random_images, tmp_path, monkeypatch
):
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
