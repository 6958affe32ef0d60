"""The checkpoint and the images that a script works on, loaded together."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from common.checkpoints.checkpoint import WEIGHTS_NAME
from common.checkpoints.models import build_model
from common.command.argument_types import AtMost
from common.command.cli import UserError, set_up_messages
from common.images.cifar import CLASSES
from common.images.folders import folder_source
from common.images.loading import load_images
from common.images.normalisation import MEAN, STD
from common.inputs import load_inputs
from common.machine.workers import ALONE, Workers


@pytest.fixture
def load(tmp_path, image_folders, blank_state, monkeypatch):
    """Load from a folder with a checkpoint and four images in each class of both splits."""
    monkeypatch.chdir(tmp_path)
    torch.save(blank_state, tmp_path / WEIGHTS_NAME)
    data_dir = image_folders(tmp_path / "data", per_class=4)

    def load(workers=ALONE, **changes):
        values = {
            "weights": None, "data_dir": data_dir, "bundled": False, "no_bundled": True,
            "test_images": 20, "seed": 3,
        }  # fmt: skip
        return load_inputs(argparse.Namespace(**values | changes), tmp_path, workers)

    return load


def test_both_splits_are_the_seeds(load, tmp_path):
    inputs = load(calibration_images=10)
    source = folder_source(tmp_path / "data")
    for found, split, count in ((inputs.test, "test", 20), (inputs.calibration, "train", 10)):
        expected = load_images(source, split, count, seed=3)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
    assert not inputs.model.training
    described = {
        "classes": list(CLASSES), "image_size": [32, 32], "mean": list(MEAN), "std": list(STD),
    }  # fmt: skip
    assert inputs.describe()["data"] == {
        "source": "folder", "test_images": 20, "calibration_images": 10, **described,
    }  # fmt: skip
    assert inputs.describe()["network"] == {
        "family": "resnet18-cifar", "layers": 21, "macs": 555_422_720, "parameters": 11_173_962,
    }  # fmt: skip
    assert inputs.weights["source"] == f"{WEIGHTS_NAME} in the working directory"


def test_calibration_images_are_loaded_only_where_asked_for(load):
    inputs = load(test_images=None)
    assert inputs.calibration is None
    assert inputs.describe()["data"]["test_images"] == 40
    assert "calibration_images" not in inputs.describe()["data"]


def test_other_training_images_are_none_of_the_calibration_images(load):
    inputs = load(calibration_images=20)
    others = inputs.load_training(20, skip=20)
    seen = {image.numpy().tobytes() for image in inputs.calibration.images}
    assert not seen & {image.numpy().tobytes() for image in others.images}


def test_a_test_split_that_is_the_train_split_is_refused(load, tmp_path):
    shutil.rmtree(tmp_path / "data" / "train")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "data" / "test")
    with pytest.raises(UserError, match="20 of 30 training images are among the 20 test images"):
        load(calibration_images=30)
    with pytest.raises(UserError, match="train and test must hold different images"):
        load()


def test_some_test_images_in_the_train_split_are_counted(load, tmp_path, capsys):
    set_up_messages(quiet=True)
    for name in ("cat", "dog", "ship"):
        copied = tmp_path / "data" / "train" / "frog" / f"{name}.png"
        shutil.copy(tmp_path / "data" / "test" / name / "1.png", copied)
    load(test_images=None).load_training(None)
    told = capsys.readouterr().err
    assert "3 of 43 training images are among the 40 test images: accuracies on them" in told


def test_what_was_found_is_said(load, tmp_path, capsys):
    set_up_messages(quiet=False)
    load(calibration_images=10)
    place = f"the image folders in {tmp_path / 'data'}"
    assert capsys.readouterr().err.splitlines() == [
        f"weights: {WEIGHTS_NAME} in the working directory",
        f"images: 20 for testing, 10 for calibration, from {place}",
    ]
    load()
    assert capsys.readouterr().err.splitlines()[-1] == f"images: 20 for testing, from {place}"


def test_the_checkpoint_is_read_before_images_are_looked_for(load):
    with pytest.raises(UserError, match=r"no\.pth: no such file"):
        load(weights=Path("no.pth"), data_dir=Path("nowhere"))


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=3, size=30):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(channels, 1, 3), nn.Linear(size * size, 10)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(1))

class Two(Net):
    def forward(self, x):
        return super().forward(x), x

class Named(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

def grey(): return Net(1)
def larger(): return Net(size=62)
def two(): return Two()
def named(): return Named()
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [("grey", "does not run on an image of 3 × 32 × 32 ("),
     ("larger", "does not run on an image of 3 × 32 × 32 ("),
     ("two", "gives something else than one tensor of logits"),
     ("named", "gives something else than one tensor of logits")],
)  # fmt: skip
def test_what_a_network_of_ones_own_cannot_do_is_one_line(function, message, load, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    model = f"{tmp_path / 'own.py'}:{function}"
    torch.save(build_model(model, {}).state_dict(), tmp_path / "own.pth")
    with pytest.raises(UserError, match=re.escape(f"the network {message}")):
        load(weights=tmp_path / "own.pth", model=model)


def test_processes_must_find_the_same(load, monkeypatch):
    """The other process is imagined: it found other images."""
    crew = Workers(torch.device("cpu"), rank=0, count=2)
    monkeypatch.setattr(Workers, "one_a_machine_first", lambda crew: contextlib.nullcontext())
    monkeypatch.setattr(Workers, "gather", lambda crew, own: [own, own | {"the images": "others"}])
    with pytest.raises(UserError, match="processes 0 and 1 differ in the images"):
        load(workers=crew)


def test_moving_takes_model_and_test_images(load):
    inputs = load().to(torch.device("meta"))
    assert inputs.test.images.is_meta
    assert next(inputs.model.parameters()).is_meta


def test_a_default_batch_size_is_bounded_by_the_largest_value(load, monkeypatch):
    inputs = load()
    largest_bytes = 4 * 64 * 32 * 32
    monkeypatch.setattr("common.inputs.MAX_VALUE_BYTES", 8 * largest_bytes)
    assert inputs.fit_batch_size(AtMost(64)) == 8
    assert inputs.fit_batch_size(AtMost(4)) == 4
    assert inputs.fit_batch_size(64) == 64  # the user's choice
    monkeypatch.setattr("common.inputs.MAX_TIMED_BYTES", 32 * largest_bytes)
    assert inputs.fit_batch_sizes([1, 32, AtMost(33)]) == [1, 32]
    assert inputs.fit_batch_sizes([33]) == [33]
