"""The benchmark of runtimes, on tiny networks and torch's engines alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cifar import normalize

from benchmarks import int8_runtimes, runtimes
from common.network.tracing import trace_network
from quantization.int8 import engines
from quantization.settings import TORCH_ENGINES
from tests.check_results import SCHEMA

ENGINES = [name for name in engines.candidate_engines() if name in TORCH_ENGINES][-2:]
ARGUMENTS = (
    "--bundled", "--test-images", "14", "--calibration-images", "10", "--batch-sizes", "7",
    "--timing-seconds", "0.01", "--threads", "1", "--batch-size", "7", "--quiet",
)  # fmt: skip


@pytest.fixture
def finished(tiny_model, tmp_path, monkeypatch, capsys):
    """A run of a tiny network, and the sizes of the batches that FP32 met."""
    met = []

    def watched(model):
        runner = watched.original(model)
        return replace(runner, run=lambda images: (met.append(len(images)), runner.run(images))[1])

    watched.original = runtimes.torch_fp32
    monkeypatch.setattr(runtimes, "torch_fp32", watched)
    monkeypatch.setattr(runtimes, "has_packages", lambda names, row: False)
    monkeypatch.setattr(engines, "candidate_engines", lambda: ENGINES)
    torch.save(tiny_model.state_dict(), tmp_path / "dense.pth")
    threads = torch.get_num_threads()
    code = int8_runtimes.main(
        [*ARGUMENTS, "--weights", str(tmp_path / "dense.pth"),
         "--output-dir", str(tmp_path / "out")]
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    return results, capsys.readouterr().out, met


def test_each_runtime_has_a_row_and_the_fastest_engine_is_named(finished):
    results, printed, met = finished
    SCHEMA.validate(results)
    rows = {row["runtime"]: row for row in results["rows"]}
    assert {"torch-fp32", *(f"int8-{engine}" for engine in ENGINES)} == rows.keys()
    fastest = max(ENGINES, key=lambda engine: rows[f"int8-{engine}"]["images_per_second"])
    assert f"Fastest engine at batch: {fastest} at 7." in printed
    assert f"ours: {ENGINES[-1]}" in printed
    assert met[:2] == [7, 7]  # --batch-size: 14 images


@torch.inference_mode()
def test_onnx_runtime_computes_fp32_too(tiny_model, random_images, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network = trace_network(tiny_model, (3, 32, 32))
    runner = runtimes.onnxruntime_fp32(network, tmp_path)
    images = normalize(random_images(5).images).contiguous()
    torch.testing.assert_close(runner.run(images), tiny_model(images), rtol=1e-4, atol=1e-4)
    assert int8_runtimes.label("onnxruntime-fp32") == "ONNX Runtime FP32"


def test_the_device_is_no_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        int8_runtimes.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --device cuda" in capsys.readouterr().err
