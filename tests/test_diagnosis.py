"""Layer diagnosis: SQNR against its definition, and that it finds the damaged place."""

from __future__ import annotations

import logging

import pytest
import torch
from quantization.bench import Bench

from common.command import cli
from common.images.data import batches
from common.network import cascade
from common.network.resnet import prunable_layers
from quantization.accuracy import diagnosis, layer_cost
from quantization.int8 import conversion, engines
from quantization.settings import Settings

ENGINE = engines.candidate_engines()[0]


def test_the_damaged_place_is_the_noisiest(tiny_model, random_images):
    block = tiny_model.layer3[1]
    with torch.no_grad():
        block.bn1.weight[:2] *= 300
        block.bn1.bias[:2] *= 300
        block.conv2.weight[:, :2] /= 300
    images = random_images(32)
    observed = conversion.calibrate(tiny_model, batches(images, 16), Settings())
    ranking = diagnosis.rank_layers(tiny_model, observed, images)
    assert set(ranking[:2]) == {"layer3.1.conv1", "layer3.1.conv2"}


def test_sqnr_is_signal_power_over_noise_power():
    signal = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    noisy = signal + torch.tensor([[0.5, 0.1, 0.0], [0.5, 0.1, 0.0]])
    # Channel 0: 12.5 / 0.25 is 17.0 dB; channel 1: 1 / 0.01 is 20 dB; channel 2 is silent.
    assert diagnosis._sqnr_db(signal, noisy) == pytest.approx(16.99, abs=0.01)
    assert diagnosis._sqnr_db(signal, signal) == diagnosis.MAX_SQNR_DB


@pytest.mark.parametrize("fp32_layers", [(), ("conv1", "layer1.0.conv2", "linear")])
def test_costs_have_an_entry_a_layer(tiny_model, random_images, fp32_layers):
    settings = Settings(ENGINE, fp32_layers=fp32_layers)
    observed = conversion.calibrate(tiny_model, batches(random_images(16), 16), settings)
    test = random_images(12, seed=3)
    bench = Bench(random_images(16), test, 12)
    rows = diagnosis.diagnose(tiny_model, observed, settings, bench)["diagnosis"]
    assert [row["layer"] for row in rows] == list(prunable_layers(tiny_model))
    for row in rows:
        assert -1 <= row["drop_only_fp32"] <= 1
        assert row["sqnr_db"] <= row["weight_sqnr_db"] + 1


def test_what_fp32_decides_after_bf16_is_recorded_and_warned_of(
    tiny_model, random_images, monkeypatch, caplog
):
    monkeypatch.setattr(layer_cost, "bf16_pays", lambda: True)
    monkeypatch.setattr(cascade, "NEAR_BOUND", -1.0)
    images = random_images(16)
    observed = conversion.calibrate(tiny_model, batches(images, 16), Settings(ENGINE))
    with caplog.at_level(logging.WARNING, logger=cli.log.name):
        found = diagnosis.diagnose(
            tiny_model, observed, Settings(ENGINE), Bench(images, random_images(12, seed=3), 12)
        )
    assert found["bf16"]["predictions"] == 21 * 12
    assert found["bf16"]["recomputed"] >= found["bf16"]["changed"]
    assert "bf16: FP32 changed a prediction" in caplog.text
    assert "--precision" not in caplog.text  # which quantization.py has not
