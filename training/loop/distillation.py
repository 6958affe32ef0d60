"""Distillation: a compressed network learns to answer as the network that it was made from does.

The labels say one class an image; the teacher's logits say how alike the others are, and go on
saying it where images are shifted, mirrored and pasted into one another (Hinton et al., 2015,
https://arxiv.org/abs/1503.02531; Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from common.images.data import Cifar10
from common.machine.workers import Workers
from training.loop.fit import EpochSummary, Loss, choose_precision, fit
from training.loop.state import TrainingState
from training.recipe import Recipe

TEMPERATURE = 2.0
LABEL_SHARE = 0.1  # of the loss that comes from the labels
# A student starts close to its teacher: it is to mend, not to learn anew.
RECIPE = Recipe(epochs=1, batch_size=128, learning_rate=0.01, warmup=0.1, label_smoothing=0.0)

Teacher = Callable[[torch.Tensor], torch.Tensor]


def distill(
    student: nn.Module,
    teacher: Teacher,
    train: Cifar10,
    epochs: int,
    seed: int,
    recipe: Recipe = RECIPE,
    after_step: Callable[[nn.Module], None] | None = None,
    after_epoch: Callable[[TrainingState, EpochSummary], None] | None = None,
) -> None:
    """Train ``student`` (changed in place, left in eval mode) towards the teacher's logits.

    Args:
        student: In any mode, on any device; moved to that of the images.
        teacher: Maps normalised images (n, 3, 32, 32), channels_last, to logits (n, classes).
        train: Images, on the device to train on.
        epochs: Passes over them.
        seed: Of order and augmentation.
        recipe: All else; its precision is what the device is fast in.
        after_step: Called with the student after every step.
        after_epoch: Called after every epoch.

    Raises:
        UserError: The loss is no longer finite.
    """
    device = train.images.device
    recipe = dataclasses.replace(
        recipe,
        epochs=epochs,
        batch_size=min(recipe.batch_size, len(train)),
        precision=choose_precision(device),
    )
    state = TrainingState.start(student, recipe, device)
    fit(
        state, train, recipe, seed, Workers(device),
        after_step=after_step, after_epoch=after_epoch, loss=distillation_loss(teacher),
    )  # fmt: skip
    student.eval()


def distillation_loss(teacher: Teacher) -> Loss:
    """Return the loss of a student's logits: mostly its divergence from the teacher's."""

    def loss(images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(images).float() / TEMPERATURE
        divergence = F.kl_div(
            (logits.float() / TEMPERATURE).log_softmax(1),
            wanted.log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        labels = F.cross_entropy(logits.float(), targets)
        # The gradient of the divergence shrinks with the square of the temperature.
        return (1 - LABEL_SHARE) * TEMPERATURE**2 * divergence + LABEL_SHARE * labels

    return loss
