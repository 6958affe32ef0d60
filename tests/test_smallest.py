"""The coded file of a wanted size: measured as it was read back."""

from __future__ import annotations

import pytest

from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.size import saved_size_bytes
from quantization.coding import encoder, smallest
from quantization.files.artifact import load_int8
from quantization.int8 import engines
from quantization.report.sections import describe_coding
from quantization.settings import Settings

ENGINE = engines.candidate_engines()[0]


def test_what_is_read_back_is_what_is_measured(tiny_model, random_images, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "POSITIONS", 4)
    images, test = random_images(32), random_images(40, seed=1)
    fp32 = predict(tiny_model, test)
    inputs = Inputs({"size_bytes": 2 * 10**6}, tiny_model, None, 0, test, images)
    settings = Settings(ENGINE, observer="minmax")
    path = tmp_path / "coded.safetensors"
    coding = smallest.write_smallest(inputs, images, fp32, settings, 16, 5.0, path)
    assert coding["file_bytes"] == path.stat().st_size
    fp32_bytes = saved_size_bytes(tiny_model.state_dict())
    assert coding["size_ratio"] == fp32_bytes / path.stat().st_size
    assert coding["size_ratio_given"] == 2 * 10**6 / path.stat().st_size
    correct = predict(load_int8(path, ENGINE), test) == test.labels
    assert coding["accuracy"]["correct"] == int(correct.sum())
    before = (fp32 == test.labels).float().mean()
    assert coding["comparison"]["drop"] == pytest.approx(float(before - correct.float().mean()))
    network = inputs.traced.network
    weights = sum(network.layers[name].weight.numel() for name in network.graph.layers)
    assert coding["bits_per_weight"] == 8 * path.stat().st_size / weights
    assert coding["bits_wanted"] == 5.0
    facts = describe_coding(coding)
    assert "asked for" not in facts.text()
    assert "(0.5 asked for)" in describe_coding(coding | {"bits_wanted": 0.5}).text()
    assert f"{coding['size_ratio']:.1f}× smaller than FP32" in facts.pairs["size"]
    assert f"{coding['size_ratio_given']:.1f}× smaller than the given file" in facts.pairs["size"]
