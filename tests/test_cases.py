"""Inputs rebuilt from public bug reports, ../shared/cases: each gives what its docstring says."""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_inputs import MARKS, SHARED

from common.checkpoints.checkpoint import find_weights, load_model, load_network
from common.command.cli import REPOSITORY, UserError, set_up_messages
from common.images.cifar import BUNDLED_ARCHIVES, CLASSES
from common.images.normalisation import NORMALISATIONS
from common.inputs import Inputs, load_inputs

WEIGHTS = SHARED / "weights" / "resnet18_cifar10.pth"
TEST_IMAGES = 500
pytestmark = MARKS


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[str], Path]:
    """Run one of the programs; return the folder with all that they wrote."""
    images, folder = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("cases")
    for archive in BUNDLED_ARCHIVES.values():
        with tarfile.open(archive) as tar:
            tar.extractall(images, filter="data")
    environment = os.environ | {"CASES_OUT": str(folder), "CASES_IMAGES": str(images)}

    @functools.cache
    def run(program: str) -> Path:
        command = [sys.executable, SHARED / "cases" / f"{program}.py"]
        subprocess.run(command, env=environment, check=True, timeout=300)
        return folder

    return run


@pytest.fixture(scope="module")
def real() -> dict[str, torch.Tensor]:
    return load_model(WEIGHTS).state_dict()


def load(weights: Path, **flags: object) -> Inputs:
    values = {
        "weights": weights, "data_dir": None, "bundled": True, "no_bundled": True, "seed": 0,
        "test_images": TEST_IMAGES, "calibration_images": 512,
    }  # fmt: skip
    return load_inputs(argparse.Namespace(**values | flags), REPOSITORY)


@torch.inference_mode()
def count_correct(inputs: Inputs) -> int:
    images = inputs.test.normalize(inputs.test.images)
    return int((inputs.model(images).argmax(1) == inputs.test.labels).sum())


@pytest.fixture(scope="module")
def real_correct() -> int:
    return count_correct(load(WEIGHTS))


def test_the_real_weights_warn_of_nothing(capsys):
    set_up_messages(quiet=True)
    load(WEIGHTS)
    assert capsys.readouterr().err == ""


# --- checkpoints ---------------------------------------------------------------------------------

SAME_WEIGHTS = {
    "prefixes": {
        "lightning.ckpt": "the prefix model. of all names",
        "prefix_model.pth": "the prefix model. of all names",
        "prefix_net.pth": "the prefix net. of all names",
        "prefix_backbone.pth": "the prefix backbone. of all names",
        "prefix_1.pth": "the prefix 1. of all names",
        "prefix_module_model.pth": "the prefix module.model. of all names",
        "prefix_fsdp.pth": "_fsdp_wrapped_module taken out",
    },
    "nested_keys": {
        **{
            f"nest_{key}.pth": f"its entry {key} is taken"
            for key in ("ema", "state_dict_ema", "weights", "params", "network", "model_state")
        },
        "nest_two_deep.pth": "its entry model.state_dict is taken",
    },
    "bookkeeping": {
        "extra_swa.pth": "n_averaged passed over",
        "extra_thop.pth": "total_ops, total_params passed over",
    },
    "plain_objects": dict.fromkeys(
        (
            f"obj_{name}.pth"
            for name in ("numpy_scalar", "numpy_history", "namespace", "path", "defaultdict",
                         "attributedict")
        ),
        "its entry state_dict is taken",
    ),
    "other_suffix": {"safetensors_named.bin": ""},
    "weiaicunzai": {"weiaicunzai.pth": "its names are mapped"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "file", "note"),
    [(p, file, note) for p, files in SAME_WEIGHTS.items() for file, note in files.items()],
)
def test_the_weights_are_the_real_ones(write, real, program, file, note, capsys):
    set_up_messages(quiet=False)
    found = load_network(find_weights(write(program) / file, REPOSITORY)).model.state_dict()
    assert len(found) == len(real)
    assert all(map(torch.equal, found.values(), real.values()))
    assert note in capsys.readouterr().err


def test_raw_and_averaged_weights(write, real, capsys):
    set_up_messages(quiet=False)
    path = write("nested_keys") / "raw_and_ema.pth"
    found = load_network(find_weights(path, REPOSITORY)).model.state_dict()
    assert all(map(torch.equal, found.values(), real.values()))
    assert f"state_dict_ema is taken; --weights {path}:state_dict" in capsys.readouterr().err
    raw = load_network(find_weights(Path(f"{path}:state_dict"), REPOSITORY)).model
    assert not torch.equal(raw.conv1.weight, real["conv1.weight"])


@pytest.mark.parametrize("file", ["extra_mu_sigma.pth", "madry.pt"])
def test_a_normaliser_in_the_checkpoint_is_used(write, real_correct, file, capsys):
    set_up_messages(quiet=False)
    inputs = load(write("bookkeeping") / file)
    assert inputs.test.mean == pytest.approx((0.4914, 0.4822, 0.4465))
    assert inputs.test.std == pytest.approx((0.2471, 0.2435, 0.2616))
    assert abs(count_correct(inputs) - real_correct) <= 1  # rewritten in FP32
    told = capsys.readouterr().err
    assert "the checkpoint holds them" in told
    assert "warning" not in told


def test_pruning_masks(write):
    folder = write("prune_masks")
    masked, removed = (
        load_model(folder / f"prune_{name}.pth").state_dict() for name in ("masks", "removed")
    )
    assert all(torch.equal(tensor, removed[name]) for name, tensor in masked.items())
    assert (masked["layer4.1.conv2.weight"] == 0).double().mean() == 0.5


def test_quantization_aware_training_is_named(write):
    with pytest.raises(UserError, match=r"quantization-aware training .*save the state_dict\(\)"):
        load_model(write("qat") / "qat_eager.pth")


# --- what a checkpoint does not say --------------------------------------------------------------

CONSTANTS = {"std247": "cifar10-std", "imagenet": "imagenet", "half": "half", "none": "none"}


@pytest.mark.parametrize(("file", "name"), CONSTANTS.items())
def test_other_constants(write, real_correct, file, name, capsys):
    set_up_messages(quiet=True)
    path = write("norm_constants") / f"norm_{file}.pth"
    load(path)
    assert f"--normalize {name} fits it" in capsys.readouterr().err
    inputs = load(path, normalize="auto")
    assert (inputs.test.mean, inputs.test.std) == NORMALISATIONS[name]
    # A shift of the mean is exact but for the borders of images.
    assert abs(count_correct(inputs) - real_correct) <= (1 if file == "std247" else 5)
    assert capsys.readouterr().err == ""


def test_another_order_of_colours(write, real_correct, capsys):
    set_up_messages(quiet=True)
    path = write("norm_constants") / "norm_bgr.pth"
    load(path)
    assert "with --channel-order bgr" in capsys.readouterr().err
    assert count_correct(load(path, channel_order="bgr")) == real_correct
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "named"),
    [("swap", "cat is called dog, dog is called cat;"), ("shuffled", "airplane is called frog")],
)
def test_classes_in_another_order(write, file, named, capsys):
    set_up_messages(quiet=True)
    load(write("class_order") / f"classes_{file}.pth")
    told = capsys.readouterr().err
    assert "classes come in another order" in told
    assert named in told


# --- image folders -------------------------------------------------------------------------------

FOLDERS = {
    "png": CLASSES,
    "val": CLASSES,
    "macosx": CLASSES,
    "capital": tuple(name.capitalize() for name in CLASSES),
    "two_digits": tuple(f"{index:02d}" for index in range(10)),
}


@pytest.mark.parametrize(("case", "classes"), FOLDERS.items())
def test_folders(write, case, classes, capsys):
    set_up_messages(quiet=True)
    data = write("folders") / "data" / case
    inputs = load(WEIGHTS, data_dir=data, bundled=False, test_images=200, calibration_images=200)
    assert inputs.test.classes == classes
    assert count_correct(inputs) > 170
    assert capsys.readouterr().err == ""


def test_class_names_that_sort_otherwise(write, capsys):
    set_up_messages(quiet=True)
    data = write("folders") / "data" / "plane_car"
    inputs = load(WEIGHTS, data_dir=data, bundled=False, test_images=200, calibration_images=200)
    assert inputs.test.classes[1] == "car"
    assert "bird is called cat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "listed"),
    [("Train_Test", "Test/, Train/"), ("training", "testing/, training/"),
     ("raw", "raw_test/, raw_train/")],
)  # fmt: skip
def test_other_folders_are_refused_with_what_is_there(write, case, listed):
    data = write("folders") / "data" / case
    with pytest.raises(UserError, match=f"are there, but {re.escape(listed)}"):
        load(WEIGHTS, data_dir=data, bundled=False)


@pytest.mark.parametrize(("case", "meant"), [("nested", "nested/cifar10"), ("png/test", "png")])
def test_a_folder_above_or_below_the_images_is_refused_with_the_right_one(write, case, meant):
    data = write("folders") / "data"
    with pytest.raises(UserError, match=f"{re.escape(str(data / meant))} has them"):
        load(WEIGHTS, data_dir=data / case, bundled=False)
