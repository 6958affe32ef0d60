"""The steps of quantization.py, on tiny models."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from quantization.bench import Bench
from quantization.int8.deploy import Quantized

from common.command import cli
from common.command.cli import UserError
from common.images.data import ImageSet
from common.measure import evaluate
from common.measure.latency import Timing
from quantization import steps
from quantization.files import artifact
from quantization.int8 import conversion, deploy, engines
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
    bench = Bench(random_images(32), test, 16)
    quantized = steps.quantize(tiny_model, bench, settings)
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
    order = [c.settings.engine for c in steps.fastest_first(candidates, timings)]
    assert order == ["quick", "steady", "bulky"]


def test_all_files_are_verified_in_one_process_and_a_difference_is_an_error(
    tiny_model, random_images, tmp_path, monkeypatch, caplog
):
    test, started = random_images(8), []
    settings = [Settings(engine) for engine in ENGINES]
    quantized = steps.quantize(tiny_model, Bench(test, test, 8), settings)
    monkeypatch.setattr(  # a fresh process takes seconds; the end-to-end tests start one
        artifact,
        "start_fresh",
        lambda *call: contextlib.nullcontext(lambda: started.append(1) or call[0](*call[1:])),
    )
    paths = steps.save_models(quantized, lambda name: tmp_path / name)
    suffixes = [".pth", ".torchscript.pt"] if deploy.CAN_FREEZE else [".pth"]
    assert list(paths) == ENGINES
    for engine, files in paths.items():
        stem = "resnet18_cifar10_int8" + (f"_{engine}" if engine != "fbgemm" else "")
        assert [path.name for path in files] == [stem + suffix for suffix in suffixes]
    saved = {path: q.deployed for q in quantized for path in paths[q.settings.engine]}
    with caplog.at_level("INFO", logger=cli.log.name), artifact.verifying_reloaded(saved, test):
        pass
    assert len(started) == 1
    assert caplog.text.count("bit-equal") == len(saved)

    candidate = quantized[0]
    with engines.quiet_torch(ENGINES[0]):
        layer = candidate.model.get_submodule("linear")
        layer.set_weight_bias(layer.weight(), layer.bias() + 1)  # not what deployed computes
    other = steps.save_models([candidate], lambda name: tmp_path / name)[ENGINES[0]][0]
    with (
        pytest.raises(UserError, match=r"int8.*\.pth: reloaded logits differ by up to"),
        artifact.verifying_reloaded({other: candidate.deployed}, test),
    ):
        pass


class Certain(torch.nn.Module):
    """Answers class 0 with near-certainty."""

    def forward(self, x):
        return torch.tensor([[20.0] + [0.0] * 9]).expand(len(x), 10)


@pytest.mark.parametrize(
    ("right", "warning"), [(10, "near chance"), (50, "100 % sure"), (90, None)]
)
def test_sanity_of_fp32(random_images, caplog, right, warning):
    images = random_images(100).images
    labels = torch.tensor([0] * right + [1] * (100 - right))
    with caplog.at_level(logging.WARNING, logger=cli.log.name):
        steps.warn_of_insane_fp32(
            Certain(), ImageSet(images, labels), torch.zeros(100, dtype=torch.int64)
        )
    assert (warning in caplog.text) if warning else not caplog.records
