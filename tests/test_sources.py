"""Where images come from: image folders, and the bundled ones."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from common.command.cli import UserError, set_up_messages
from common.images import cifar
from common.images.decoding import Sizing
from common.images.loading import load_images
from common.images.normalisation import NORMALISATIONS
from common.images.sources import open_source

# --- image folders -------------------------------------------------------------------------------


def test_image_folders(image_folders, tmp_path):
    root = image_folders(tmp_path, per_class=2)
    source = open_source(root)
    split = source.open_split("test")
    assert source.name == "folder"
    assert split.labels.tolist() == sorted([*range(10), *range(10)])
    pixels = split.read(np.array([5, 0]))
    for index, path in enumerate(("bird/1.png", "airplane/0.png")):
        expected = np.asarray(Image.open(root / "test" / path)).transpose(2, 0, 1)
        assert np.array_equal(pixels[index], expected)


def test_classes_may_be_numbers(image_folders, tmp_path):
    split = open_source(image_folders(tmp_path, 1, tuple("0123456789"))).open_split("train")
    assert split.labels.tolist() == list(range(10))


def test_what_is_no_image_is_passed_over(image_folders, tmp_path, capsys):
    set_up_messages(quiet=True)
    root = image_folders(tmp_path)
    (root / "test" / ".git").mkdir()
    (root / "test" / "README.txt").touch()
    cats = root / "test" / "cat"
    for name in (".DS_Store", "._0.png", "Thumbs.db", "labels.csv"):
        (cats / name).touch()
    (cats / "folder.png").mkdir()
    os.mkfifo(cats / "pipe.png")  # reading it would wait for ever
    split = open_source(root).open_split("test")
    assert split.labels.tolist() == list(range(10))
    assert split.read(np.arange(10)).shape == (10, 3, 32, 32)
    told = capsys.readouterr().err
    assert "test: 3 passed over, such as cat/folder.png; images are files that end in" in told
    assert "train: " not in told


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_other_names_of_the_test_split(name, image_folders, tmp_path):
    root = image_folders(tmp_path)
    (root / "test").rename(root / name)
    source = open_source(root, is_given=True)
    assert source.open_split("test").labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    "names", [("Cat", "Dog"), ("plane", "car"), tuple(f"{i:02d}" for i in range(12))]
)
def test_classes_are_the_sorted_names_of_the_folders(names, image_folders, tmp_path):
    root = image_folders(tmp_path, 2, names)
    for split in ("train", "test"):
        (root / split / "__MACOSX").mkdir()
        (root / split / ".DS_Store").touch()
    source = open_source(root, is_given=True)
    assert source.classes == tuple(sorted(names))
    images = load_images(source, "test", None, seed=0)
    assert images.classes == tuple(sorted(names))
    assert torch.bincount(images.labels).tolist() == [2] * len(names)


def test_images_of_one_size_keep_it_and_larger_ones_are_normalised_as_imagenet(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / split / "a" / "0.png")
    images = load_images(open_source(tmp_path, is_given=True), "test", None, seed=0)
    assert images.shape == (3, 40, 60)
    assert (images.mean, images.std) == NORMALISATIONS["imagenet"]
    sized = open_source(tmp_path, sizing=Sizing(32, 32, 36), is_given=True)
    assert load_images(sized, "train", None, seed=0).shape == (3, 32, 32)


def test_images_of_several_sizes_become_224_pixels(tmp_path, capsys):
    set_up_messages(quiet=False)
    for split, size in (("train", 40), ("test", 50)):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (size, size)).save(tmp_path / split / "a" / "0.png")
    images = load_images(open_source(tmp_path, is_given=True), "test", None, seed=0)
    assert images.shape == (3, 224, 224)
    assert "--image-size takes another" in capsys.readouterr().err


def test_cifar_100(tmp_path, monkeypatch):
    """Batches of the published form, without the published checksums."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        content = {"data": pixels, "fine_labels": [7, 99, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {i:02d}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    source = open_source(tmp_path, is_given=True)
    assert (source.name, source.classes) == ("cifar100", tuple(names))
    split = source.open_split("test")
    assert split.labels.tolist() == [7, 99, 0]
    assert np.array_equal(split.read(np.array([2, 0])), pixels[[2, 0]].reshape(2, 3, 32, 32))


# --- bundled images ------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("test", 10_000), ("train", 2_000)])
def test_bundled_images(split, count, tmp_path):
    opened = open_source(tmp_path / "absent", bundled=True).open_split(split)
    assert np.bincount(opened.labels).tolist() == [count // 10] * 10
    pixels = opened.read(np.array([0, count - 1]))
    assert pixels.shape == (2, 3, 32, 32)
    assert not np.array_equal(pixels[0], pixels[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xfd7zXZ\0damaged", None], ids=["empty", "cut", "none"])
def test_damaged_bundled_images_are_an_error(content, tmp_path, monkeypatch):
    archive = tmp_path / "images.tar.xz"
    if content is not None:
        archive.write_bytes(content)
    monkeypatch.setitem(cifar.BUNDLED_ARCHIVES, "test", archive)
    with pytest.raises(UserError, match=r"images\.tar\.xz: bundled images are missing or damaged"):
        open_source(tmp_path, bundled=True).open_split("test")


def test_an_empty_folder_is_for_cifar10_whatever_lies_beside_it(tmp_path, monkeypatch):
    asked = []

    def refuse(folder):
        asked.append(folder)
        raise OSError("offline")

    monkeypatch.setattr(cifar, "download_cifar10", refuse)
    for name in ("cifar", "train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="could not be downloaded"):
        open_source(tmp_path / "cifar", is_given=True)
    assert asked == [tmp_path / "cifar"]
