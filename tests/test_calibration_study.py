"""The calibration study's table and what it supports."""

from __future__ import annotations

import pytest
import torch

from benchmarks.calibration_study import best_row, format_study, make_row, read_calibration
from common.command.cli import UserError
from common.images.data import load_images
from common.images.sources import Source, Split


@pytest.fixture
def rows():
    observers = ("histogram", "minmax", "moving-average", "percentile")
    return [
        make_row(name, size, (0.9 - 0.01 * i, 0.92, 0.91), (0.97, 0.94 + 0.01 * i, 0.98))
        for i, name in enumerate(observers)
        for size in (32, 128, 512)
    ]


def test_mean_and_spread():
    row = make_row("minmax", 32, (0.90, 0.92, 0.94), (1.0, 1.0, 1.0))
    assert row["mean"] == pytest.approx(0.92)
    assert row["spread"] == pytest.approx(0.04)


def test_the_worst_seeds_agreement_decides_and_fewer_images_break_ties(rows):
    best = best_row(rows)
    assert (best["observer"], best["calibration_images"]) == ("percentile", 32)
    assert min(best["accuracies"]) < min(rows[0]["accuracies"])  # which is not what counts


def test_table_names_the_choice(rows):
    text = format_study(rows, fp32_accuracy=0.93)
    assert text.splitlines()[-1] == "most like FP32 at its worst: percentile on 32 images"
    assert max(map(len, text.splitlines())) <= 80


def test_the_training_split_is_opened_once(random_images):
    images, opened = random_images(600), []
    split = Split(images.labels.numpy(), lambda rows: images.images[rows].numpy())
    source = Source("random", "random images", lambda name: opened.append(name) or split)
    train = read_calibration(source)
    assert opened == ["train"]
    assert [len(subset) for subset in train.values()] == [512] * 3
    smaller = load_images(source, "train", 32, seed=1)
    assert torch.equal(train[1].images[:32], smaller.images)


def test_fewer_images_than_the_largest_set_are_refused(random_images):
    images = random_images(40)
    split = Split(images.labels.numpy(), lambda rows: images.images[rows].numpy())
    with pytest.raises(UserError, match="512 training images asked for, only 40 in random images"):
        read_calibration(Source("random", "random images", lambda name: split))
