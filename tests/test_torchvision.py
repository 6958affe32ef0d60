"""torchvision's networks on image folders: both scripts to the end, ONNX Runtime like torch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from check_results import check_results
from networks import dequantized
from PIL import Image
from processes import run_here
from torch import nn

from common.images.data import ImageSet
from common.images.loading import load_images
from common.images.sources import open_source
from common.network.graph import FLATTEN, INPUT, Graph, Operation
from pruning import pruning
from quantization import quantization
from quantization.files.int8_file import read_int8
from quantization.int8.engines.onnx_engines import load_onnx, to_onnx
from quantization.int8.engines.reference import ReferenceRunner
from quantization.int8.network import Int8Network
from quantization.steps import ONNX

# Least share of the images of which ONNX Runtime and torch say the same. An EfficientNet of random
# weights amplifies single roundings, which engines do differently, until they change the class.
AGREEMENT = {"resnet18": 0.95, "regnet_y_400mf": 0.95, "efficientnet_b0": 0.5}
MAX_ROUNDINGS = 0.005  # share of an operation's values that engines may round otherwise
CLASSES, SIZE = 5, 64
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


@torch.inference_mode()
def assert_same_operations(network: Int8Network, images: ImageSet) -> None:
    """Run each operation with one input alone: ONNX Runtime rounds as the reference does."""
    names = [operation.name for operation in network.graph.operations]
    given = {network.graph.input: images.normalize(images.images)}
    values = dequantized(network).run(given, names)
    steps = [step for step in network.steps()[1:] if len(step.inputs) == 1]
    for step in steps:
        (source,) = step.inputs
        alone = Operation(source, INPUT, (), {"shape": list(values[source].shape[1:])})
        own = (network.graph[n] for n in dict.fromkeys((step.operation.name, step.name)))
        operations = [alone, *own]
        ranges = {name: network.ranges[name] for name in (source, step.name)}
        if values[step.name].ndim == 4:  # ONNX files give a number for each class
            operations.append(Operation("flat", FLATTEN, (step.name,), {}))
            ranges["flat"] = ranges[step.name]
        layers = {n: layer for n, layer in network.layers.items() if n == step.operation.name}
        part = replace(
            network, graph=Graph(tuple(operations)), layers=layers, ranges=ranges,
            classes=("",) * values[step.name][0].numel(),
        )  # fmt: skip
        given = ranges[source].round(values[source])
        expected = ReferenceRunner(part)(given)
        found = load_onnx(to_onnx(part))(given)
        levels = (found - expected).abs() / ranges[step.name].scale
        assert levels.max() < 1.5, step.name
        assert (levels > 0.5).double().mean() <= MAX_ROUNDINGS, step.name


@pytest.mark.parametrize("name", AGREEMENT)
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
    assert onnx["agreement"] >= AGREEMENT[name]
    (path,) = folder.glob("*.safetensors")
    test = load_images(open_source(data_dir, is_given=True), "test", 4, seed=0)
    assert_same_operations(read_int8(path), test)

    folder = tmp_path / "pruning"
    finished = run_here(
        pruning.main, *common, "--test-images", "10", "--amounts", "0.9", "--output-dir", folder
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert len(results["sensitivity"]) == results["network"]["layers"]
