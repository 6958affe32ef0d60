"""Networks as others published them, on whole test sets: the counts were measured elsewhere."""

from __future__ import annotations

import argparse
import functools
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_inputs import MARKS, SHARED

from common.command.cli import REPOSITORY
from common.images.normalisation import NORMALISATIONS
from common.inputs import Inputs, load_inputs
from common.measure.evaluate import predict
from pruning.alone.brute_force import classify_all, pruned_copy
from pruning.alone.scan import Scan, run_scan
from quantization.int8 import engines
from quantization.int8.conversion import convert, observe
from quantization.int8.engines.base import Int8Model

TOLERANCE = 5  # images
SCANNED_IMAGES = 100
pytestmark = MARKS


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    @functools.cache
    def unpack(*archives: str) -> Path:
        folder = tmp_path_factory.mktemp("images")
        for archive in archives:
            with tarfile.open(SHARED / "data" / f"{archive}.tar.xz") as tar:
                tar.extractall(folder, filter="data")
        return folder

    return unpack


def load(data_dir: Path, weights: str, **flags: object) -> Inputs:
    values = {
        "data_dir": data_dir, "bundled": False, "no_bundled": True, "test_images": None, "seed": 0,
        "weights": SHARED / "networks" / weights, "calibration_images": 512,
    }  # fmt: skip
    return load_inputs(argparse.Namespace(**values, **flags), REPOSITORY)


def count_correct(inputs: Inputs, model: Callable[[torch.Tensor], torch.Tensor]) -> int:
    return int((predict(model, inputs.test) == inputs.test.labels).sum())


def quantize(inputs: Inputs) -> Int8Model:
    engine = engines.default_engines()[0]
    settings = engines.choose_settings(engine)
    observation = observe(inputs.traced.network, inputs.calibration, settings.observer, 64)
    model = engines.runner(engine, convert(observation, settings))
    assert not model.fp32_operations
    return model


def count_differences(inputs: Inputs) -> list[int]:
    """Return by how many images the scan and one pass per layer differ, layer by layer."""
    images = inputs.test.rows(slice(SCANNED_IMAGES))
    layers = list(inputs.traced.network.graph.layers)
    scan = Scan(inputs.model, images, layers, [0.9], 16, fast=False)
    correct = run_scan(scan)[0].correct
    return [
        int((correct[0.9, layer] != classify_all(pruned_copy(inputs.model, {layer: 0.9}), images))
            .sum())
        for layer in layers
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "correct"), [("resnet20-12fca82f.th", 8103), ("resnet56-4bfd9763.th", 8320)]
)
def test_cifar_resnets(unpack, weights, correct):
    folder = unpack("cifar10_jpeg_test", "cifar10_jpeg_train")
    inputs = load(folder, weights, normalize="auto")
    assert (inputs.test.mean, inputs.test.std) == NORMALISATIONS["imagenet"]
    found = count_correct(inputs, inputs.model)
    assert abs(found - correct) <= TOLERANCE
    assert found - count_correct(inputs, quantize(inputs)) <= 0.01 * len(inputs.test)
    assert max(count_differences(inputs)) == 0


def test_mobilenet_v2(unpack):
    flags = {"model": "torchvision:mobilenet_v2", "image_size": 96}
    inputs = load(unpack("sign_digits") / "sign_digits", "mobilenet_v2_sign.pth", **flags)
    assert count_correct(inputs, inputs.model) == 596
    assert 596 - count_correct(inputs, quantize(inputs)) <= 0.005 * 600
