"""The moving average of the weights, and batch-norm statistics that fit it."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

from common.cifar10 import IMAGE_SIZE
from common.data import Cifar10
from training.augment import make_batch, plan_epoch, resize
from training.precision import autocast
from training.recipe import Recipe
from training.state import TrainingState

BATCH_NORM_BATCH, BATCH_NORM_IMAGES = 500, 5000


def update_average(state: TrainingState, recipe: Recipe) -> None:
    """Move the average towards the weights; in the first steps, when little is known, faster."""
    decay = min(recipe.ema_decay, (1 + state.steps_done) / (10 + state.steps_done))
    update = get_ema_multi_avg_fn(decay)
    update(list(state.average.parameters()), list(state.model.parameters()), None)


def averaged_model(
    state: TrainingState,
    train: Cifar10,
    recipe: Recipe,
    seed: int,
    size: int = IMAGE_SIZE,
    count: int = BATCH_NORM_IMAGES,
) -> nn.Module:
    """Return the averaged network with batch-norm statistics of its own, in eval mode.

    The activations of averaged weights are not the average of the activations, so the statistics
    are measured anew (Izmailov et al., 2018, https://arxiv.org/abs/1803.05407): on augmented
    images, as the weights were trained to have them normalised.

    Args:
        state: Left as it is.
        train: Training images.
        recipe: Says how to augment them, and in which precision to run.
        seed: Of the choice of images and of their augmentation.
        size: Side of the images in pixels.
        count: How many images to use, at most; all batches are of the same size.
    """
    count = min(count, len(train))
    batch_size = min(BATCH_NORM_BATCH, count)
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(train))[:count])
    chosen = chosen.to(train.images.device)
    pixels, labels = resize(train.images[chosen], size), train.labels[chosen]
    plan = plan_epoch(count, size, recipe, seed, state.epochs_done, chosen.device)
    starts = range(0, count - batch_size + 1, batch_size)
    model = copy.deepcopy(state.average)
    with autocast(recipe.precision, chosen.device):
        update_bn(
            (make_batch(pixels, labels, plan, slice(s, s + batch_size))[0] for s in starts), model
        )
    return model.eval()
