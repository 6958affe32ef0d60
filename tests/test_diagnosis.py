"""Layer diagnosis: the branching scan against whole forward passes, SQNR against its definition."""

from __future__ import annotations

import pytest
import torch

from common.data import batches, normalize
from common.model import fold_batch_norm
from quantization import diagnosis, engines
from quantization.engines import Settings


@pytest.fixture
def observed(tiny_model, random_images):
    return engines.calibrate(tiny_model, batches(random_images(32), 16), Settings())


@torch.inference_mode()
def test_only_quantized_equals_whole_forward_passes(tiny_model, observed, random_images):
    test = random_images(24, seed=2)
    dense, alone = diagnosis.scan_only_quantized(tiny_model, observed, test, batch_size=10)
    x = normalize(test.images)
    assert torch.equal(dense, tiny_model(x).argmax(dim=1) == test.labels)
    quantizers = engines.layer_quantizers(observed)
    assert list(alone) == list(quantizers)
    for name, (read, write) in quantizers.items():
        whole = fold_batch_norm(tiny_model)
        layer = whole.get_submodule(name)
        layer.weight = torch.nn.Parameter(engines.quantize_weight(layer.weight))
        layer.register_forward_pre_hook(lambda _, args, read=read: (read(args[0]),))
        layer.register_forward_hook(lambda _, args, y, write=write: write(y))
        correct = whole(x).argmax(dim=1) == test.labels
        assert int((correct != alone[name]).sum()) <= 1, name


def test_the_damaged_place_is_the_noisiest(tiny_model, random_images):
    block = tiny_model.layer3[1]
    with torch.no_grad():
        block.bn1.weight[:2] *= 300
        block.bn1.bias[:2] *= 300
        block.conv2.weight[:, :2] /= 300
    images = random_images(32)
    observed = engines.calibrate(tiny_model, batches(images, 16), Settings())
    ranking = diagnosis.rank_layers(tiny_model, observed, images)
    assert set(ranking[:2]) == {"layer3.1.conv1", "layer3.1.conv2"}


def test_sqnr_is_signal_power_over_noise_power():
    signal = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    noisy = signal + torch.tensor([[0.5, 0.1, 0.0], [0.5, 0.1, 0.0]])
    # Channel 0: 12.5 / 0.25 is 17.0 dB; channel 1: 1 / 0.01 is 20 dB; channel 2 is silent.
    assert diagnosis._sqnr_db(signal, noisy) == pytest.approx(16.99, abs=0.01)
    assert diagnosis._sqnr_db(signal, signal) == diagnosis.MAX_SQNR_DB


def test_costs_have_an_entry_a_layer(tiny_model, observed, random_images):
    test = random_images(12, seed=3)
    rows = diagnosis.diagnose(
        tiny_model, observed, Settings(engines.candidate_engines()[0]), random_images(16), test, 12
    )
    assert [row["layer"] for row in rows] == list(engines.layer_quantizers(observed))
    for row in rows:
        assert -1 <= row["drop_only_fp32"] <= 1
        assert row["sqnr_db"] <= row["weight_sqnr_db"] + 1
