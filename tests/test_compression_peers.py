"""benchmarks/compression_peers.py: rows, their order and what they are measured on."""

import argparse
import copy
import hashlib
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from test_int8_runtimes import ARGUMENTS
from test_results_schema import SCHEMA

from benchmarks import compression_peers, peers
from common.checkpoints.resnet import BlockShape, ResNet, ResNetShape
from common.measure.evaluate import predict
from common.network.tracing import trace_network
from quantization.files.int8_file import save_int8


@pytest.fixture
def pipeline(tiny_weights, convert, tmp_path):
    """A folder as pipeline.py leaves it: one answer and what is known of the run."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    save_int8(convert(peers.engines.choose_settings("fbgemm")), folder / "a.safetensors")
    results = {
        "answers": [{"name": "size", "file": "a.safetensors"}],
        "budget": {"max_drop": 0.01},
        "weights": {"sha256": hashlib.sha256(tiny_weights.read_bytes()).hexdigest()},
        "data": {"test_images": 14},
        "arguments": {"seed": 0},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def run(tiny_weights, pipeline, tmp_path, monkeypatch, capsys):
    def run(*more: str) -> tuple[int, object]:
        threads = torch.get_num_threads()
        code = compression_peers.main(
            [*ARGUMENTS, "--weights", str(tiny_weights), "--pipeline", str(pipeline),
             "--output-dir", str(tmp_path / "out"), *more]
        )  # fmt: skip
        torch.set_num_threads(threads)
        return code, capsys.readouterr()

    monkeypatch.setattr(peers, "has_packages", lambda names, row: False)
    return run


def test_an_answer_is_evaluated_on_the_other_half_and_timed(run, pipeline, tmp_path):
    code, printed = run()
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    SCHEMA.validate(results)
    (row,) = results["rows"]
    assert (row["method"], row["setting"]) == ("ours", "size, within 1.0%")
    assert row["size_bytes"] == (pipeline / "a.safetensors").stat().st_size
    assert row["accuracy"]["total"] == 7  # half of 14
    assert [timing["batch_size"] for timing in row["latency"]] == [7]
    assert "ours" in printed.out


def test_results_of_another_seed_are_refused(run):
    code, printed = run("--seed", "1")
    assert code == 1
    assert "results for another checkpoint, other test images or seed" in printed.err


def test_a_folder_without_results_is_refused(run, pipeline):
    (pipeline / "results.json").write_text("[]")
    code, printed = run()
    assert code == 1
    assert f"{pipeline}: no results of pipeline.py" in printed.err


def test_the_best_rows_are_those_within_a_point():
    def row(method: str, size_bytes: int, drop: float, speed: float | None = None) -> dict:
        timed = {} if speed is None else {"latency": [{"images_per_second": speed}]}
        return {
            "method": method, "size_bytes": size_bytes, "comparison": {"drop": drop}, **timed
        }  # fmt: skip

    rows = [
        row("a", 5, 0.01, 10.0), row("a", 3, 0.011, 30.0), row("a", 4, 0.0, 9.0),
        row("b", 2, -0.1), row("c", 1, 0.5, 99.0),
    ]  # fmt: skip
    assert compression_peers.best(rows) == {"a": rows[2], "b": rows[3]}
    assert compression_peers.best(rows, speed=True) == {"a": rows[0]}


def test_torch_pruning_leaves_streams_with_channels_of_zeros_alone():
    stages = tuple((BlockShape((width, width), False),) * 2 for width in (8, 16))
    padded = ResNet(ResNetShape(3, 8, stages, 10)).eval()
    inner = {f"layer{stage}.{block}.conv1" for stage in (1, 2) for block in (0, 1)}
    network = trace_network(padded, (3, 16, 16))
    assert set(network.graph.layers) - set(peers._fixed_layers(network)) == inner
    plain = trace_network(ResNet(ResNetShape(3, 8, stages[:1], 10)).eval(), (3, 16, 16))
    assert peers._fixed_layers(plain) == ["linear"]


def test_batch_norms_are_estimated_again_where_the_answers_are_then_more_alike(
    tiny_model, random_images
):
    images = random_images(64)
    dense = predict(tiny_model, images)
    same = copy.deepcopy(tiny_model)
    assert peers._choose_statistics(same, images, dense) is same
    narrower = copy.deepcopy(tiny_model)
    with torch.no_grad():
        narrower.bn1.running_var.mul_(0.01)
    assert peers._choose_statistics(narrower, images, dense) is not narrower


def test_a_tool_goes_on_until_the_answers_are_others(tiny_model, random_images, monkeypatch):
    """With a codec that rounds to steps twice as large for each next value."""
    images = random_images(64)
    inputs = argparse.Namespace(model=tiny_model, calibration=images, test=images)

    def encode(tensors, args):
        step = 2.0 ** (args["qp"] / 2 + 10)
        return pickle.dumps({n: np.round(a / step) * step for n, a in tensors.items()})

    codec = types.SimpleNamespace(encode=encode, decode=pickle.loads)
    monkeypatch.setitem(sys.modules, "nncodec", types.SimpleNamespace(nn=codec))
    monkeypatch.setitem(sys.modules, "nncodec.nn", codec)
    dense = predict(tiny_model, images)
    alike = [peers._alike(made.run, images, dense) for made in peers.nncodec(inputs)]
    assert 1 < len(alike) < len(peers.QUANTIZER_STEPS)
    assert min(alike[:-1]) >= peers.LEAST_ALIKE > alike[-1]
