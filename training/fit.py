"""The training loop: any network on any CIFAR-10 images, epoch by epoch.

    state = TrainingState.start(model, recipe, device)
    fit(state, images, recipe, seed=0, workers=Workers(device))

``after_step`` is for what must hold after every step, such as the mask of a pruned network;
``after_epoch`` is for measuring and saving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import cli
from common.cli import UserError
from common.data import Cifar10
from common.workers import Workers
from training.augment import make_batch, plan_epoch, resize
from training.averaging import update_average
from training.precision import autocast
from training.recipe import Recipe
from training.state import TrainingState


@dataclass(frozen=True)
class EpochSummary:
    """What one epoch of training came to; accuracy is that on augmented images, while learning."""

    epoch: int
    image_size: int
    learning_rate: float
    loss: float
    train_accuracy: float
    seconds: float


def fit(
    state: TrainingState,
    train: Cifar10,
    recipe: Recipe,
    seed: int,
    workers: Workers,
    after_step: Callable[[nn.Module], None] | None = None,
    after_epoch: Callable[[TrainingState, EpochSummary], None] | None = None,
) -> None:
    """Train from where ``state`` is to the recipe's last epoch.

    Args:
        state: Changed in place.
        train: Images, on the device of ``workers``.
        recipe: What to do.
        seed: Of order and augmentation.
        workers: The processes that share each batch.
        after_step: Called with the network after every step, before it enters the average.
        after_epoch: Called after every epoch.

    Raises:
        UserError: There are fewer images than a batch takes, the processes cannot share a batch
            equally, or the loss is no longer finite.
    """
    if recipe.batch_size % workers.count:
        raise UserError(f"{workers.count} processes cannot share a batch of {recipe.batch_size}")
    if recipe.batch_size > len(train):
        raise UserError(f"a batch of {recipe.batch_size} from only {len(train)} training images")
    network = workers.parallelize(state.model)
    if recipe.compile:
        network = torch.compile(network)
    pixels, size = None, None
    while state.epochs_done < recipe.epochs:
        if size != recipe.image_size_at(state.epochs_done):
            size = recipe.image_size_at(state.epochs_done)
            pixels = resize(train.images, size)
        summary = _train_epoch(
            state, network, pixels, train.labels, recipe, seed, workers, after_step
        )
        if after_epoch is not None:
            after_epoch(state, summary)


def _train_epoch(
    state: TrainingState,
    network: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    seed: int,
    workers: Workers,
    after_step: Callable[[nn.Module], None] | None,
) -> EpochSummary:
    start_time = time.perf_counter()
    epoch, size = state.epochs_done, pixels.shape[1]
    plan = plan_epoch(len(pixels), size, recipe, seed, epoch, pixels.device)
    steps = len(pixels) // recipe.batch_size  # what is left over waits for the next shuffle
    totals = torch.zeros(2, device=pixels.device)  # loss, correct: read once, at the end
    network.train()
    bar = cli.progress(range(steps), f"epoch {epoch + 1}/{recipe.epochs}")
    for step in bar:
        rate = recipe.learning_rate_at((state.steps_done + 0.5) / (recipe.epochs * steps))
        rows = workers.share_of(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        images, targets = make_batch(pixels, labels, plan, rows)
        totals += _step(state, network, images, targets, recipe, rate)
        if after_step is not None:
            after_step(state.model)
        update_average(state, recipe)
    loss, correct = workers.sum(totals).tolist()
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in epoch {epoch + 1}; try a lower --learning-rate")
    state.epochs_done += 1
    return EpochSummary(
        epoch=state.epochs_done,
        image_size=size,
        learning_rate=rate,
        loss=loss / (steps * workers.count),
        train_accuracy=correct / (steps * recipe.batch_size),
        seconds=time.perf_counter() - start_time,
    )


def _step(
    state: TrainingState,
    network: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    recipe: Recipe,
    learning_rate: float,
) -> torch.Tensor:
    """Take one step; return the batch's mean loss and number of correct images, shape (2,)."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    with autocast(recipe.precision, images.device):
        logits = network(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.steps_done += 1
    return torch.stack(
        (loss.detach().float(), (logits.argmax(1) == targets.argmax(1)).sum().float())
    )
