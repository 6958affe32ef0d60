"""Networks as others published them, on whole test sets: the counts were measured elsewhere."""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import pytest
import torch

from common.command.cli import REPOSITORY
from common.inputs import load_inputs

SHARED = REPOSITORY.parent / "shared"
TOLERANCE = 5  # images
pytestmark = [
    pytest.mark.shared,
    pytest.mark.full,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not there"),
]


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    def unpack(*archives: str) -> Path:
        folder = tmp_path_factory.mktemp("images")
        for archive in archives:
            with tarfile.open(SHARED / "data" / f"{archive}.tar.xz") as tar:
                tar.extractall(folder, filter="data")
        return folder

    return unpack


def count_correct(data_dir: Path, weights: str, **flags: object) -> int:
    values = {"data_dir": data_dir, "bundled": False, "no_bundled": True, "test_images": None}
    args = argparse.Namespace(**values, weights=SHARED / "networks" / weights, seed=0, **flags)
    inputs = load_inputs(args, REPOSITORY)
    with torch.inference_mode():
        return sum(
            int((inputs.model(images).argmax(1) == labels).sum())
            for images, labels in inputs.test.batches(100)
        )


def test_cifar_resnets(unpack):
    folder = unpack("cifar10_jpeg_test", "cifar10_jpeg_train")
    for weights, correct in (("resnet20-12fca82f.th", 8103), ("resnet56-4bfd9763.th", 8320)):
        found = count_correct(folder, weights, normalize="auto")
        assert abs(found - correct) <= TOLERANCE, weights


def test_mobilenet_v2(unpack):
    folder = unpack("sign_digits")
    if not (folder / "train").is_dir():
        (folder,) = folder.iterdir()
    flags = {"model": "torchvision:mobilenet_v2", "image_size": 96}
    assert count_correct(folder, "mobilenet_v2_sign.pth", **flags) == 596
