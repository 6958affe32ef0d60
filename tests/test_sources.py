"""Where images come from: image folders, and the bundled ones."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from common.command.cli import UserError
from common.images import sources
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


def test_what_is_no_image_is_passed_over(image_folders, tmp_path):
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
    monkeypatch.setitem(sources.BUNDLED_ARCHIVES, "test", archive)
    with pytest.raises(UserError, match=r"images\.tar\.xz: bundled images are missing or damaged"):
        open_source(tmp_path, bundled=True).open_split("test")
