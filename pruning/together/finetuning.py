"""Training after pruning: a few epochs in which what was pruned stays away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from common.images.data import Cifar10, batches
from common.network.resnet import ResNet18, prunable_layers
from quantization.int8 import conversion, deploy, engines
from training.loop.distillation import RECIPE, Teacher, distill

# Slim networks have been repaired already, and a high rate undoes that. At 0.006 and batches of 64,
# 25,000 images left one of 40 % of the multiply-adds where it was: 89.85 and 89.80 %.
SLIM_RATE = 0.004
TEACHER_IMAGES = 256  # to calibrate it


def hold_zeros(model: nn.Module) -> Callable[[nn.Module], None]:
    """Return what sets the weights that are zero in ``model`` now to zero again."""
    zeros = {name: layer.weight == 0 for name, layer in prunable_layers(model).items()}

    @torch.no_grad()
    def apply(model: nn.Module) -> None:
        for name, layer in prunable_layers(model).items():
            layer.weight.masked_fill_(zeros[name], 0)

    return apply


def finetune(model: ResNet18, dense: ResNet18, train: Cifar10, epochs: int, seed: int) -> None:
    """Train a pruned model to answer as the dense one does; its zeros stay zeros.

    Args:
        model: Changed in place, left in eval mode.
        dense: What it was made from, in eval mode.
        train: Images, on the models' device.
        epochs: Passes over them.
        seed: Of order and augmentation.

    Raises:
        UserError: The loss is no longer finite.
    """
    teacher = dense if train.images.is_cuda else int8_teacher(dense, train)
    slim = model.widths != dense.widths
    recipe = dataclasses.replace(RECIPE, learning_rate=SLIM_RATE) if slim else RECIPE
    distill(model, teacher, train, epochs, seed, recipe, after_step=hold_zeros(model))


def int8_teacher(dense: ResNet18, train: Cifar10) -> Teacher:
    """Return the dense network in INT8: on a CPU its answers cost a fraction of the training."""
    settings = engines.choose_settings(engines.candidate_engines()[-1])
    sample = train.rows(slice(TEACHER_IMAGES))
    observed = conversion.calibrate(dense, batches(sample, 128), settings)
    deployed = deploy.deploy(conversion.convert(observed, settings), settings.engine)

    def answer(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):  # which its tracing would meet
            return deployed(images)

    return answer
