import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar import image_set, normalize
from hypothesis import given
from hypothesis import strategies as st

from training.loop.augment import make_batch, plan_epoch
from training.recipe import BUNDLED_RECIPE, Recipe

CPU = torch.device("cpu")
PLAIN = Recipe(epochs=2, batch_size=8, learning_rate=0.1, crop_padding=0, flip=False)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    )


def batch_of(images, recipe, rows=slice(0, 40), seed=0, epoch=0):
    labels = torch.arange(40) % 10
    plan = plan_epoch(40, 32, recipe, seed, epoch, CPU)
    return plan, *make_batch(image_set(images, labels), images.permute(0, 2, 3, 1), plan, rows)


def test_without_augmentation_a_batch_is_the_normalized_images(images):
    plan, batch, targets = batch_of(images, PLAIN)
    assert torch.equal(batch, normalize(images[plan.order]))
    assert torch.equal(targets, F.one_hot(plan.order % 10, 10).float())
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_crop_and_flip_equal_torchs_padding_and_flipping(images):
    plan, batch, _ = batch_of(images, replace(PLAIN, crop_padding=4, flip=True))
    assert plan.shift.min() == -4
    assert plan.shift.max() == 4
    for row in range(40):
        padded = F.pad(normalize(images[plan.order[row], None]), (4, 4, 4, 4), mode="reflect")
        y, x = (plan.shift[row] + 4).tolist()
        width = slice(x, x + 32)
        expected = padded[..., y : y + 32, width]
        if plan.flip[row]:
            expected = expected.flip(-1)
        assert torch.equal(batch[row], expected[0]), row
    assert 5 < plan.flip.sum() < 35


def test_cutmix_shares_out_the_probability_by_area(images):
    plain = batch_of(images, PLAIN)[1]
    plan, batch, targets = batch_of(images, replace(PLAIN, cutmix=1.0))
    for row in range(40):
        other = (row - 1) % 40
        from_other = (batch[row] == plain[other]).all(0)
        assert torch.equal(batch[row][:, ~from_other], plain[row][:, ~from_other])
        expected = torch.zeros(10)
        expected[plan.order[other] % 10] += from_other.float().mean()
        expected[plan.order[row] % 10] += 1 - from_other.float().mean()
        assert torch.allclose(targets[row], expected, atol=1e-6)
    assert targets.max(1).values.min() < 0.9


def test_cutmix_covers_the_fraction_of_images_asked_for():
    plan = plan_epoch(10_000, 32, replace(PLAIN, cutmix=0.3), 0, 0, CPU)
    covered = (plan.patch_size > 0).float().mean()
    assert abs(covered - 0.3) < 0.03


def test_jitter_changes_only_its_share_of_images(images):
    plain = batch_of(images, PLAIN)[1]
    _, batch, _ = batch_of(images, replace(PLAIN, jitter=0.3))
    unchanged = (batch - plain).abs().amax((1, 2, 3)) < 1e-4
    assert 8 < unchanged.sum() < 36  # 0.7 × 0.7 of 40 in expectation
    _, batch, _ = batch_of(images, replace(PLAIN, jitter=1.0))
    assert ((batch - plain).abs().amax((1, 2, 3)) > 1e-2).all()


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_a_plan_is_a_function_of_seed_and_epoch(seed, epoch):
    first, second = (plan_epoch(20, 32, BUNDLED_RECIPE, seed, epoch, CPU) for _ in range(2))
    for name in ("order", "shift", "flip", "patch", "patch_size", "affine", "colour"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert sorted(first.order.tolist()) == list(range(20))
    assert not torch.equal(
        first.order, plan_epoch(20, 32, BUNDLED_RECIPE, seed, epoch + 1, CPU).order
    )


def test_batches_of_an_epoch_are_the_epoch_in_parts(images):
    recipe = replace(PLAIN, crop_padding=4, jitter=0.5)
    whole = batch_of(images, recipe)[1]
    parts = [batch_of(images, recipe, slice(s, s + 8))[1] for s in range(0, 40, 8)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@given(warmup=st.floats(0, 1), progress=st.floats(0, 1))
def test_learning_rate_rises_then_falls_to_zero(warmup, progress):
    recipe = replace(PLAIN, warmup=warmup)
    rate = recipe.learning_rate_at(progress)
    assert 0 <= rate <= recipe.learning_rate * (1 + 1e-9)
    later = recipe.learning_rate_at(min(progress + 1e-3, 1.0))
    if progress >= warmup:
        assert later <= rate
    if progress + 1e-3 < warmup:
        assert later >= rate


def test_learning_rate_at_known_points():
    recipe = replace(PLAIN, warmup=0.2, learning_rate=0.4)
    assert recipe.learning_rate_at(0.1) == pytest.approx(0.2)
    assert recipe.learning_rate_at(0.2) == pytest.approx(0.4)
    assert recipe.learning_rate_at(0.6) == pytest.approx(0.2)  # half way down the cosine
    assert recipe.learning_rate_at(0.4) == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert recipe.learning_rate_at(1.0) == pytest.approx(0, abs=1e-12)
