"""The steps of quantization.py, on tiny models."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

import pytest
import torch
from cifar import image_set

from common.command import cli
from common.command.cli import UserError
from common.measure import evaluate
from common.measure.latency import Timing
from quantization import steps
from quantization.files import artifact
from quantization.files.int8_file import save_int8
from quantization.int8 import conversion, engines
from quantization.settings import Settings
from quantization.steps import CalibrationSetup, Quantized

ENGINES = engines.candidate_engines()


def timing(batch_size, median_ms):
    return Timing(batch_size, median_ms, 0.0, 1000 * batch_size / median_ms, 7)


def quantized_with(engine, predictions=None):
    return Quantized(None, None, predictions, Settings(engine))


def test_engines_share_an_observation_and_the_integers(tiny_network, random_images, monkeypatch):
    calls = []
    observe = conversion.observe
    monkeypatch.setattr(
        conversion, "observe", lambda *arguments: calls.append(1) or observe(*arguments)
    )
    settings = [Settings(engine) for engine in ENGINES]
    settings.append(Settings(ENGINES[0], observer="minmax"))
    test = random_images(24, seed=1)
    setup = CalibrationSetup(random_images(32), test, 16)
    quantized = steps.quantize(tiny_network, setup, settings)
    assert len(calls) == 2
    assert len({id(candidate.model.network) for candidate in quantized}) == 2
    assert [candidate.settings for candidate in quantized] == settings
    for candidate in quantized:
        assert candidate.model.engine == candidate.settings.engine
        again = evaluate.predict(candidate.model, test, 16, "again")
        assert torch.equal(candidate.predictions, again)


def test_the_fastest_comes_first_by_the_geometric_mean():
    timings = {
        "steady": [timing(1, 2.0), timing(128, 200.0)],  # √400
        "bulky": [timing(1, 5.0), timing(128, 100.0)],  # √500
        "quick": [timing(1, 1.0), timing(128, 300.0)],  # √300
    }
    candidates = [quantized_with(name) for name in timings]
    order = [c.settings.engine for c in steps.fastest_first(candidates, timings)]
    assert order == ["quick", "steady", "bulky"]


def test_all_models_are_verified_in_one_process_and_a_difference_is_an_error(
    tiny_network, random_images, tmp_path, monkeypatch, caplog
):
    test, started = random_images(8), []
    settings = [Settings(engine) for engine in ENGINES]
    quantized = steps.quantize(tiny_network, CalibrationSetup(test, test, 8), settings)
    monkeypatch.setattr(  # a fresh process takes seconds; the end-to-end tests start one
        artifact,
        "start_fresh",
        lambda *call: contextlib.nullcontext(lambda: started.append(1) or call[0](*call[1:])),
    )
    paths = steps.save_models(quantized, lambda name: tmp_path / name, "net")
    assert list(paths) == ENGINES
    assert {path.name for path in paths.values()} == {"net_int8.safetensors"}
    models = [(paths[each.settings.engine], each.model) for each in quantized]
    with caplog.at_level("INFO", logger=cli.log.name), artifact.verifying_reloaded(models, test):
        pass
    assert len(started) == 1
    assert caplog.text.count("bit-equal") == 1

    path, network = models[0][0], quantized[0].model.network
    layer = network.layers["linear"]
    changed = {**network.layers, "linear": replace(layer, bias=layer.bias + 1)}
    save_int8(replace(network, layers=changed), path)
    with (
        pytest.raises(UserError, match=r"int8\.safetensors: reloaded logits differ by up to"),
        artifact.verifying_reloaded(models, test),
    ):
        pass


def test_engines_that_need_other_bits_have_a_file_of_their_own(
    tiny_network, random_images, tmp_path
):
    test = random_images(8)
    settings = [Settings(ENGINES[0]), Settings(ENGINES[-1], reduce_range=True)]
    quantized = steps.quantize(tiny_network, CalibrationSetup(test, test, 8), settings)
    paths = steps.save_models(quantized, lambda name: tmp_path / name, "net")
    names = [path.name for path in paths.values()]
    assert names == ["net_int8.safetensors", "net_int8_7bit.safetensors"]
    for candidate in quantized:
        model = artifact.load_int8(paths[candidate.settings.engine], candidate.settings.engine)
        assert model.network.settings.reduce_range == candidate.settings.reduce_range


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
        steps.warn_of_odd_accuracy(
            Certain(), image_set(images, labels), torch.zeros(100, dtype=torch.int64)
        )
    assert (warning in caplog.text) if warning else not caplog.records
