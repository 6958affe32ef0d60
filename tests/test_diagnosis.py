"""Layer diagnosis: SQNR against its definition, and that it finds the damaged place."""

from __future__ import annotations

import logging

import pytest
import torch
from every_kind import make_every_kind, make_images

from common.command import cli
from common.network import cascade
from common.network.execution import Layer
from common.network.tracing import trace_network
from quantization.accuracy import diagnosis
from quantization.int8 import engines
from quantization.int8.conversion import observe
from quantization.settings import Settings

ENGINE = engines.candidate_engines()[0]


def test_the_damaged_place_is_the_noisiest(tiny_network, random_images):
    first, second = (tiny_network.layers[f"layer3.1.{name}"] for name in ("conv1", "conv2"))
    factor = torch.ones(len(first.bias))
    factor[:2] = 300
    damaged = tiny_network.with_layers(
        {
            "layer3.1.conv1": Layer(first.weight * factor.view(-1, 1, 1, 1), first.bias * factor),
            "layer3.1.conv2": Layer(second.weight / factor.view(-1, 1, 1), second.bias),
        }
    )
    ranking = diagnosis.rank_layers(observe(damaged, random_images(32), "histogram", 16), False)
    assert set(ranking[:2]) == {"layer3.1.conv1", "layer3.1.conv2"}


def test_sqnr_is_signal_power_over_noise_power():
    signal = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    noisy = signal + torch.tensor([[0.5, 0.1, 0.0], [0.5, 0.1, 0.0]])
    # Channel 0: 12.5 / 0.25 is 17.0 dB; channel 1: 1 / 0.01 is 20 dB; channel 2 is silent.
    assert diagnosis._sqnr_db(signal, noisy) == pytest.approx(16.99, abs=0.01)
    assert diagnosis._sqnr_db(signal, signal) == diagnosis.MAX_SQNR_DB


@pytest.mark.parametrize("fp32_layers", [(), ("stem", "hidden")])
def test_costs_have_an_entry_a_layer_of_any_network(fp32_layers):
    network = trace_network(make_every_kind(), (3, 12, 12))
    observation = observe(network, make_images(16), "histogram", 16)
    settings = Settings(ENGINE, fp32_layers=fp32_layers)
    rows = diagnosis.diagnose(observation, settings, make_images(12, seed=3), 12)["diagnosis"]
    assert [row["layer"] for row in rows] == list(network.graph.layers)
    for row in rows:
        assert -1 <= row["drop_only_fp32"] <= 1
        assert row["sqnr_db"] <= row["weight_sqnr_db"] + 1


def test_what_fp32_decides_after_bf16_is_recorded_and_warned_of(
    tiny_network, random_images, monkeypatch, caplog
):
    monkeypatch.setattr(diagnosis, "bf16_pays", lambda: True)
    monkeypatch.setattr(cascade, "NEAR_BOUND", -1.0)
    observation = observe(tiny_network, random_images(16), "histogram", 16)
    with caplog.at_level(logging.WARNING, logger=cli.log.name):
        found = diagnosis.diagnose(observation, Settings(ENGINE), random_images(12, seed=3), 12)
    assert found["bf16"]["predictions"] == 21 * 12
    assert found["bf16"]["recomputed"] >= found["bf16"]["changed"]
    assert "bf16: FP32 changed a prediction" in caplog.text
    assert "--precision" not in caplog.text  # which quantization.py has not
