"""Images in memory: normalisation, subsets, halves and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision import transforms

from common.command.cli import UserError
from common.images.cifar10 import MEAN, STD
from common.images.data import ImageSet, balanced_subset, batches, load_images, normalize
from common.images.sources import Source, Split

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
def test_balanced_subset(labels, data, seed):
    count = data.draw(st.integers(0, len(labels)))
    chosen = balanced_subset(labels, count, seed)
    assert len(chosen) == count
    assert len(set(chosen.tolist())) == count
    assert np.array_equal(chosen, balanced_subset(labels, count, seed))
    available = np.bincount(labels, minlength=10)
    taken = np.bincount(labels[chosen], minlength=10)
    # No class gives fewer than another by more than one, unless it has no more to give.
    assert all(taken[i] == available[i] or taken[i] >= taken.max() - 1 for i in range(10))


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
    source = Source("folder", "a test", lambda split: Split(by_class(20), read))
    whole = load_images(source, "test", None, seed=0)
    for images in (whole, *map(whole.rows, whole.halves(0))):
        assert all(len(images.labels[i : i + 20].unique()) == 10 for i in range(0, 100, 20))


def test_balanced_subset_depends_on_the_seed():
    labels = np.arange(1000) % 10
    assert not np.array_equal(balanced_subset(labels, 100, 0), balanced_subset(labels, 100, 1))


@given(label_arrays.filter(lambda labels: len(labels) > 1), st.integers(0, 2**32 - 1))
def test_halves(labels, seed):
    # Pixels that tell which image it is.
    images = torch.arange(len(labels))[:, None, None, None].expand(-1, 3, 1, 1)
    whole = ImageSet(images, torch.from_numpy(labels))
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
    images, labels = zip(*batches(dataset, batch_size), strict=True)
    assert max(map(len, labels)) == min(batch_size, 20)
    assert torch.equal(torch.cat(images), normalize(dataset.images))
    assert torch.equal(torch.cat(labels), dataset.labels)


def counted_source(count: int, asked: list[np.ndarray]) -> Source:
    def read(indices: np.ndarray) -> np.ndarray:
        asked.append(indices)
        return indices.astype(np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)

    return Source("folder", "a test", lambda split: Split(np.arange(count) % 10, read))


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
    with pytest.raises(UserError, match="38 test images asked for, only 37 in a test"):
        load_images(counted_source(37, []), "test", 38, seed=0)
