"""The search over whole channels: its answer on a tiny network, told, written and timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from check_page import check_page
from check_results import check_model_search, check_results
from cifar import image_set, normalize
from processes import run_here
from resnet18 import ResNet18, Widths, weight_modules

from common.checkpoints.checkpoint import load_model
from common.command.cli import UserError
from common.measure.evaluate import Accuracy
from common.network.tracing import trace_network
from common.search.budget import Verdict
from pruning.alone.scan import Scan
from pruning.channels import search as channel_search
from pruning.channels.search import RECONSTRUCTED, ChannelSearch, require_possible
from pruning.files import saved
from pruning.pruning import main
from pruning.report.search_plots import plot_model_search, plot_slim
from pruning.report.together import tell_search, tell_slim
from pruning.steps import prune_together
from pruning.together.search import Method
from training.loop.distillation import Training


@pytest.fixture
def scan(tiny_model, random_images):
    """The tiny network on images that it classifies as labelled."""
    images = random_images(120, seed=5).images
    with torch.no_grad():
        labels = tiny_model(normalize(images)).argmax(1)
    return Scan(tiny_model, image_set(images, labels), ["linear"], [0.5], 16, False)


def prepare(scan, calibration, **choices):
    correct = torch.ones(len(scan.images), dtype=torch.bool)
    choices = {"tolerance": 0.3, "macs_removed": None} | choices
    return ChannelSearch.prepare(
        scan, correct, "channels", choices["tolerance"], 0, calibration,
        macs_removed=choices["macs_removed"],
    )  # fmt: skip


def macs(model):
    return sum(trace_network(model, (3, 32, 32)).macs.values())


def test_as_many_multiply_adds_go_as_asked_for(scan, random_images):
    search = prepare(scan, random_images(40))
    for share in (0.25, 0.5):
        slim = search.prune(Method(RECONSTRUCTED, False), share)
        assert macs(slim) <= (1 - share) * macs(scan.model)
        assert not slim.training


def test_what_is_not_possible_is_told_before_the_scan(tiny_model, monkeypatch):
    network = trace_network(tiny_model, (3, 32, 32))
    require_possible(network, None)
    require_possible(network, 0.5)
    with pytest.raises(UserError, match=r"--remove-macs: of this network .* can go at most"):
        require_possible(network, 0.99)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    with pytest.raises(UserError, match="no INT8 engine"):
        require_possible(network, 0.5)


def test_a_network_as_narrow_as_can_be_has_a_curve(scan, random_images, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SECONDS_PER_BATCH_SIZE", 0.01)
    monkeypatch.setattr(saved, "TIMED_BATCH_SIZES", (1, 2))
    narrow = ResNet18(Widths((1,) * 4)).eval()
    search = prepare(replace(scan, model=narrow), random_images(4))
    assert search.curve == (0.0,)
    assert search.prune(Method(RECONSTRUCTED, False), 0.0) is narrow
    told = prune_together(search, Training(random_images(64), 1), tmp_path / "slim.pth")
    plot_model_search(told["model_search"], 0.3, tmp_path / "search.png")


def test_a_run_on_a_slim_checkpoint_ends_in_a_slimmer_one(tiny_state, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SECONDS_PER_BATCH_SIZE", 0.01)
    monkeypatch.setattr(saved, "TIMED_BATCH_SIZES", (1, 2))
    monkeypatch.setattr(channel_search, "CALIBRATION_IMAGES", 40)
    weights, folder = tmp_path / "weights.pth", tmp_path / "out"
    torch.save(tiny_state, weights)
    done = run_here(
        main, "--bundled", "--threads", "1", "--test-images", "20", "--layers", "linear",
        "--weights", weights, "--scope", "channels", "--tolerance", "0.49", "--remove-macs",
        "0.3", "--report", "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "INT8, slim against dense" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    check_page((folder / "report.html").read_text())
    assert "slim.png" in results["artifacts"]["plots"]
    slim = tmp_path / "slim.pth"
    (folder / results["artifacts"]["model"]).rename(slim)
    before, after = (
        sum(Widths.of(load_model(path).state_dict()).inner) for path in (weights, slim)
    )
    assert after < before


def test_the_slim_network_is_written_timed_and_told(scan, random_images, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SECONDS_PER_BATCH_SIZE", 0.01)
    monkeypatch.setattr(saved, "TIMED_BATCH_SIZES", (1, 2))
    calibration, path = random_images(40), tmp_path / "slim.pth"
    search = prepare(scan, calibration, macs_removed=0.3)
    training = Training(random_images(64), 1)
    # Over the tolerance, trained or not: what was asked for is written all the same.
    monkeypatch.setattr(search, "judge", lambda model: Verdict(Accuracy(0, 60), None, -1.0))
    told = prune_together(search, training, path)
    json.dumps(told)
    for entry in told["model_search"]:
        check_model_search(entry)
    first, tuned = told["model_search"]
    assert (first["scope"], first["allocation"], first["max_sparsity"]) == (
        "channels", RECONSTRUCTED, 0.3,
    )  # fmt: skip
    assert (tuned["allocation"], tuned["finetune_epochs"]) == (RECONSTRUCTED, 1)
    assert tuned["max_sparsity"] == 0.3
    assert first["macs_kept"] <= 0.7
    slim = load_model(path)
    narrower = {row["layer"]: (row["dense"], row["slim"]) for row in told["slim"]["widths"]}
    dense = weight_modules(scan.model)
    assert narrower == {
        name: (len(dense[name].weight), len(layer.weight))
        for name, layer in weight_modules(slim).items()
        if len(layer.weight) < len(dense[name].weight)
    }
    models = told["slim"]["models"]
    assert [model["name"] for model in models] == [
        "dense fp32", "dense int8", "slim fp32", "slim int8",
    ]  # fmt: skip
    assert models[2]["macs"] == macs(slim)
    assert models[2]["accuracy"] == told["model_saved"]["accuracy"]
    assert [entry["batch_size"] for entry in told["slim"]["speedup"]] == [1, 2]
    assert "slim INT8" in tell_slim(told["slim"])[0].text()
    plot_slim(models, tmp_path / "slim.png")
    results = told | {"arguments": {"tolerance": 0.3}, "artifacts": {"model": path.name},
                      "weights": {"size_bytes": 10**6}}  # fmt: skip
    assert "multiply-adds" in tell_search(results)[0].text()
    plot_model_search(told["model_search"], 0.3, tmp_path / "search.png")
    assert {file.name for file in tmp_path.iterdir()} == {"slim.pth", "slim.png", "search.png"}
