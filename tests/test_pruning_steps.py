"""The steps of pruning.py on networks that are no ResNet: several linear layers, or none."""

import argparse

import pytest
import torch
from check_results import check_pruning
from cifar import image_set
from torch import nn

from common.inputs import load_inputs
from pruning import steps
from pruning.alone.brute_force import verify
from pruning.alone.scan import Scan, run_scan
from pruning.report import plots, story
from pruning.report.results import describe_scan
from pruning.steps import prune_linear, read_calibration


def make_scan(*modules):
    """A scan of a network, on images of 8 × 8 pixels that it classifies as labelled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *modules).eval()
    pixels = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    images = image_set(pixels, torch.zeros(60, dtype=torch.int64))
    with torch.no_grad():
        images.labels[:] = model(images.normalize(pixels)).argmax(1)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return Scan(model, images, names, [0.5, 0.9], 16, False)


def run(scan, tmp_path):
    """Do what pruning.py does, and return results.json."""
    scanned, _ = run_scan(scan)
    results = describe_scan(scan, scanned) | {"artifacts": {"plots": []}}
    if scan.head is not None:
        path = tmp_path / "pruned.pth"
        results |= prune_linear(scan, scanned, 0.05, 0, path)
        results["artifacts"] |= {"model": path.name}
    results |= {
        "arguments": {"tolerance": 0.05}, "network": {"family": "a network", "parameters": 3},
        "environment": {"device": "cpu", "cpu": "a CPU", "threads": 1},
        "weights": {"size_bytes": 9, "coded": False},
        "data": {"source": "noise", "test_images": 60}, "wall_seconds": 1.0,
        "peak_memory_bytes": None,
        "verification": verify(scan, scanned, 0.05) | {"seconds": 1.0, "speedup": 2.0},
    }  # fmt: skip
    check_pruning(results, tmp_path)
    story.write_csv_files(results, lambda name: tmp_path / name)
    plots.draw_all(results, lambda name: tmp_path / name)
    return results


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(steps, "time_zeros", lambda models, images: [
        {"name": name, "batch_size": 16, "median_ms": 1.0, "noisy": False} for name in models
    ])  # fmt: skip


def test_few_training_images_are_enough(image_folders, blank_state, tmp_path):
    torch.save(blank_state, tmp_path / "weights.pth")
    inputs = load_inputs(
        argparse.Namespace(
            weights=tmp_path / "weights.pth", data_dir=image_folders(tmp_path / "data", 4),
            bundled=False, no_bundled=True, test_images=20, seed=0,
        ), tmp_path
    )  # fmt: skip
    assert len(read_calibration(inputs)) == 40


def test_several_linear_layers(tmp_path):
    scan = make_scan(nn.Flatten(), nn.Linear(216, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))
    results = run(scan, tmp_path)
    linear, verification = results["linear_search"], results["verification"]
    assert linear["layers"] == ["4", "7"]
    assert len(linear["curve"]) == 101
    assert verification["different"] == 0
    assert verification["pruned_weights"] == linear["pruned_weights"] > 0
    assert results["savings"]["linear_share"] == (216 * 12 + 12 * 5) / (216 * 12 + 60 + 6 * 27)
    state = torch.load(tmp_path / "pruned.pth", weights_only=True)
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in ("4", "7"))
    assert zeros == linear["pruned_weights"]
    text = story.tell(results).text(tmp_path)
    assert "Linear layers: binary search within 5 points of dense" in text
    assert "where the linear layers hold 94.2" in text
    assert "\nLargest amount found: " in text
    assert "How sure that is\n  saved model" in text
    assert (tmp_path / "linear_search.png").exists()


def test_network_that_ends_in_a_convolution(tmp_path):
    scan = make_scan(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    results = run(scan, tmp_path)
    assert "linear_search" not in results
    assert "pruned_weights" not in results["verification"]
    text = story.tell(results).text(tmp_path)
    assert "Linear layers: none at the end of this network" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert "sensitivity.csv" in names
    assert not any(name.startswith("linear") for name in names)
