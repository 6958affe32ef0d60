"""torchvision's networks on image folders: both scripts to the end, ONNX Runtime like torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision
from check_results import check_results
from PIL import Image
from processes import run_here
from torch import nn

from common.images.loading import load_images
from common.images.sources import open_source
from pruning import pruning
from quantization import quantization
from quantization.steps import ONNX

NAMES = ("resnet18",)
CLASSES, SIZE = 5, 96
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folders of five classes; an image is a coarse pattern in the colours of its class."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    colours = rng.integers(64, 256, (CLASSES, 3))
    for split, count in (("train", 13), ("test", 8)):
        for label in range(CLASSES):
            (folder / split / f"class {label}").mkdir(parents=True)
            for index in range(count):
                pattern = rng.random((6, 6, 1)) * colours[label]
                image = Image.fromarray(pattern.astype(np.uint8)).resize((SIZE, SIZE))
                image.save(folder / split / f"class {label}" / f"{index}.jpg")
    return folder


@pytest.fixture
def weights(name, data_dir, tmp_path):
    """Random weights; batch norms fit their activations, so that answers vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = load_images(open_source(data_dir, is_given=True), "train", None, seed=0)
    with torch.no_grad():
        model(images.normalize(images.images))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("name", NAMES)
def test_both_scripts_come_to_the_end(name, weights, data_dir, tmp_path):
    model = [] if name.startswith("resnet") else ["--model", f"torchvision:{name}"]
    common = ["--weights", weights, *model, "--data-dir", data_dir, "--threads", "1", "--quiet"]
    folder = tmp_path / "quantization"
    finished = run_here(
        quantization.main, *common, "--test-images", "all", "--calibration-images", "32",
        "--export-onnx", "--batch-sizes", "1", "--timing-seconds", "0.1", "--output-dir", folder,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert results["data"]["image_size"] == [SIZE, SIZE]
    (onnx,) = (found for found in results["models"] if found["name"] == ONNX)
    assert onnx["agreement"] >= 0.95

    folder = tmp_path / "pruning"
    finished = run_here(
        pruning.main, *common, "--test-images", "10", "--amounts", "0.9", "--output-dir", folder
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert len(results["sensitivity"]) == results["network"]["layers"]
