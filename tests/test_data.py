"""Images in memory: normalisation, subsets, halves and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cifar import image_set, normalize, source
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision import transforms

from common.command.argument_types import AtMost
from common.command.cli import UserError, set_up_messages
from common.images import data
from common.images.data import allocate, balanced_subset
from common.images.loading import Source, Split, load_images
from common.images.normalisation import MEAN, STD

label_arrays = arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 9))


def test_normalize_equals_torchvision_bit_for_bit():
    every_value = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
    noise = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for images in (every_value, noise):
        expected = torch.stack([reference(image.transpose(1, 2, 0)) for image in images])
        given_images = torch.from_numpy(images)
        before = given_images.clone()
        assert torch.equal(normalize(given_images), expected)
        assert torch.equal(given_images, before)


def test_normalize_lays_out_channels_last():
    batch = normalize(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)


@given(label_arrays, st.data(), st.integers(0, 2**32 - 1))
def test_balanced_subset(labels, drawn, seed):
    count = drawn.draw(st.integers(0, len(labels)))
    chosen = balanced_subset(labels, count, seed)
    assert len(chosen) == count
    assert len(set(chosen.tolist())) == count
    assert np.array_equal(chosen, balanced_subset(labels, count, seed))
    shares = np.bincount(labels, minlength=10) * count / len(labels)
    taken = np.bincount(labels[chosen], minlength=10)
    assert np.all(np.abs(taken - shares) <= len(np.unique(labels)) / 2 + 1)
    of_equal_classes = by_class(5)
    chosen = balanced_subset(of_equal_classes, count % 50, seed)
    taken = np.bincount(of_equal_classes[chosen], minlength=10)
    assert taken.max() - taken.min() <= 1


def test_a_subset_keeps_the_proportions_of_the_classes():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    assert np.bincount(labels[balanced_subset(labels, 50, seed=1)]).tolist() == [30, 15, 5]


def test_unbalanced_classes_are_told(capsys):
    set_up_messages(quiet=False)
    labels = np.repeat([0, 1], [30, 10])
    read = lambda indices: np.zeros((len(indices), 3, 4, 4), np.uint8)  # noqa: E731
    images_of = source(lambda split: Split(labels, read), ("cat", "dog"))
    load_images(images_of, "test", 20, seed=0)
    assert capsys.readouterr().err == (
        "the classes have from 10 (dog) to 30 (cat) test images; subsets keep their proportions\n"
    )


def test_what_does_not_fit_in_memory_lies_in_a_file(monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES_IN_MEMORY", 1000)
    mapped = allocate((10, 3, 8, 8))
    assert isinstance(mapped, np.memmap)
    mapped[:] = np.arange(10, dtype=np.uint8)[:, None, None, None]
    images = image_set(torch.from_numpy(mapped), torch.arange(10))
    for rows in (torch.tensor([7, 2, 2, 9, 0, 1]), torch.arange(10) % 2 == 0):
        chosen = images.rows(rows)
        assert torch.equal(chosen.images[:, 0, 0, 0].long(), images.labels[rows])
        assert torch.equal(chosen.labels, images.labels[rows])


def test_blue_first():
    images = image_set(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.zeros(2))
    swapped = replace(images, channel_order="bgr")
    assert torch.equal(
        swapped.normalize(swapped.images), images.normalize(images.images)[:, [2, 1, 0]]
    )


def by_class(images_a_class: int) -> np.ndarray:
    """Labels as folders have them: sorted by class."""
    return np.arange(10).repeat(images_a_class)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_any_slice_of_a_subset_is_balanced(start, length, seed):
    labels = by_class(50)
    counts = np.bincount(labels[balanced_subset(labels, 200, seed)][start:][:length], minlength=10)
    assert counts.max() - counts.min() <= 2  # one where it begins within a round, one where it ends


def test_a_subset_is_shuffled_within_its_classes():
    labels = by_class(50)
    chosen = balanced_subset(labels, 500, seed=0)
    assert all(np.any(np.diff(chosen[labels[chosen] == label]) < 0) for label in range(10))


def test_whole_splits_and_halves_are_shuffled_too():
    read = lambda indices: indices[:, None, None, None] * np.ones((1, 3, 1, 1), np.int64)  # noqa: E731
    images_of = source(lambda split: Split(by_class(20), read))
    whole = load_images(images_of, "test", None, seed=0)
    for images in (whole, *map(whole.rows, whole.halves(0))):
        assert all(len(images.labels[i : i + 20].unique()) == 10 for i in range(0, 100, 20))


def test_balanced_subset_depends_on_the_seed():
    labels = np.arange(1000) % 10
    assert not np.array_equal(balanced_subset(labels, 100, 0), balanced_subset(labels, 100, 1))


@given(label_arrays.filter(lambda labels: len(labels) > 1), st.integers(0, 2**32 - 1))
def test_halves(labels, seed):
    # Pixels that tell which image it is.
    images = torch.arange(len(labels))[:, None, None, None].expand(-1, 3, 1, 1)
    whole = image_set(images, torch.from_numpy(labels))
    first, second = map(whole.rows, whole.halves(seed))
    ids = [half.images[:, 0, 0, 0].tolist() for half in (first, second)]
    assert sorted(ids[0] + ids[1]) == list(range(len(labels)))
    for half, members in zip((first, second), ids, strict=True):
        assert half.labels.tolist() == labels[members].tolist()
    counts = [np.bincount(half.labels, minlength=10) for half in (first, second)]
    assert np.all(np.abs(counts[0] - counts[1]) <= 1)


def test_one_image_has_no_halves(random_images):
    with pytest.raises(UserError, match="takes two"):
        random_images(1).halves(0)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_batches_yield_each_image_once_in_order(random_images, batch_size):
    dataset = random_images(20)
    images, labels = zip(*dataset.batches(batch_size), strict=True)
    assert max(map(len, labels)) == min(batch_size, 20)
    assert torch.equal(torch.cat(images), normalize(dataset.images))
    assert torch.equal(torch.cat(labels), dataset.labels)


def counted_source(count: int, asked: list[np.ndarray]) -> Source:
    def read(indices: np.ndarray) -> np.ndarray:
        asked.append(indices)
        return indices.astype(np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)

    return source(lambda split: Split(np.arange(count) % 10, read))


def test_load_images_reads_only_what_is_asked_for():
    asked = []
    dataset = load_images(counted_source(100, asked), "test", 20, seed=3)
    (indices,) = asked
    assert len(indices) == len(dataset) == 20
    assert torch.bincount(dataset.labels).tolist() == [2] * 10
    assert dataset.images[:, 0, 0, 0].tolist() == indices.tolist()
    assert (dataset.images[:, 0, 0, 0] % 10).tolist() == dataset.labels.tolist()


def test_load_images_reads_the_whole_split():
    assert len(load_images(counted_source(37, []), "test", None, seed=0)) == 37


def test_load_images_needs_enough_of_them():
    with pytest.raises(UserError, match=r"^--test-images 38: only 37 test images in a test$"):
        load_images(counted_source(37, []), "test", 38, seed=0, flag="--test-images")
    beside = "^8 train images asked for, beside 30 for another purpose: only 37 train"
    with pytest.raises(UserError, match=beside):
        load_images(counted_source(37, []), "train", 8, seed=0, skip=30)


def test_a_default_takes_what_there_is():
    assert len(load_images(counted_source(37, []), "test", AtMost(38), seed=0)) == 37
    assert len(load_images(counted_source(37, []), "test", AtMost(8), seed=0, skip=30)) == 7


def test_each_image_is_followed_by_its_mirror_image():
    images = image_set(
        torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2).to(torch.uint8), torch.tensor([4, 7])
    )
    pairs = images.with_mirrored()
    assert pairs.labels.tolist() == [4, 4, 7, 7]
    assert torch.equal(pairs.images[::2], images.images)
    assert pairs.images[1, 0].tolist() == [[1, 0], [3, 2]]
    assert pairs.images[3, 2].tolist() == [[21, 20], [23, 22]]
