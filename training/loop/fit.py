"""The training loop: any network on any CIFAR-10 images, epoch by epoch.

    state = TrainingState.start(model, recipe, device)
    fit(state, images, recipe, seed=0, workers=Workers(device))

``loss`` is for another aim than the labels, such as a teacher's answers; ``after_step`` for what
must hold after every step, such as the mask of a pruned network; ``after_epoch`` for measuring and
saving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.command import cli
from common.command.cli import UserError
from common.images.data import ImageSet
from common.images.storage import MAX_BYTES_IN_MEMORY
from common.machine.device import bf16_pays
from common.machine.workers import Workers
from training.loop.augment import make_batch, plan_epoch
from training.loop.state import TrainingState
from training.recipe import Recipe

# Of normalised images, logits and class probabilities: the mean loss.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class EpochSummary:
    """What one epoch of training came to; accuracy is that on augmented images, while learning."""

    epoch: int
    learning_rate: float
    loss: float
    train_accuracy: float
    seconds: float


def choose_precision(device: torch.device) -> str:
    """Return ``bf16`` where a device's convolutions and products are fast in it, else ``fp32``."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and bf16_pays()
    return "bf16" if fast else "fp32"


def fit(
    state: TrainingState,
    train: ImageSet,
    recipe: Recipe,
    seed: int,
    workers: Workers,
    loss: Loss | None = None,
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
        loss: By default the cross-entropy, labels smoothed as the recipe says.
        after_step: Called with the network after every step.
        after_epoch: Called after every epoch.

    Raises:
        UserError: There are fewer images than a batch takes, the processes cannot share a batch
            equally, or the loss is no longer finite.
    """
    if recipe.batch_size % workers.count:
        raise UserError(f"{workers.count} processes cannot share a batch of {recipe.batch_size}")
    if recipe.batch_size > len(train):
        raise UserError(f"a batch of {recipe.batch_size} from only {len(train)} training images")

    def smoothed_cross_entropy(images, logits, targets) -> torch.Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    # Gradients are averaged over the processes; batch-norm statistics are those of the first, each
    # normalises its own images.
    network = DistributedDataParallel(state.model) if workers.count > 1 else state.model
    if train.shape[1] != train.shape[2]:
        raise UserError("training needs square images: --image-size cuts them")
    pixels = train.images.permute(0, 2, 3, 1)
    if pixels.numel() <= MAX_BYTES_IN_MEMORY:
        pixels = pixels.contiguous()  # for gathers
    steps = len(train) // recipe.batch_size  # what is left over waits for the next shuffle
    while state.epochs_done < recipe.epochs:
        started, epoch = time.perf_counter(), state.epochs_done
        plan = plan_epoch(len(train), pixels.shape[1], recipe, seed, epoch, pixels.device)
        totals = torch.zeros(2, device=pixels.device)  # loss, correct: read once, at the end
        _set_training(network, recipe)
        for step in cli.progress(range(steps), f"epoch {epoch + 1}/{recipe.epochs}"):
            rate = recipe.learning_rate_at((epoch + (step + 0.5) / steps) / recipe.epochs)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            first = step * recipe.batch_size
            rows = workers.share_of(first, first + recipe.batch_size)
            images, targets = make_batch(train, pixels, plan, rows)
            is_bf16 = recipe.precision == "bf16"
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_bf16):
                logits = network(images)
                lost = (loss or smoothed_cross_entropy)(images, logits, targets)
            state.optimizer.zero_grad(set_to_none=True)
            lost.backward()
            state.optimizer.step()
            if after_step is not None:
                after_step(state.model)
            correct = (logits.argmax(1) == targets.argmax(1)).sum()
            totals += torch.stack((lost.detach().float(), correct.float()))
        total_loss, correct = torch.stack(workers.gather(totals.cpu())).sum(0).tolist()
        if not math.isfinite(total_loss):
            raise UserError(
                f"the loss is {total_loss} in epoch {epoch + 1}; try a lower learning rate"
            )
        state.epochs_done += 1
        summary = EpochSummary(
            epoch=state.epochs_done,
            learning_rate=rate,
            loss=total_loss / (steps * workers.count),
            train_accuracy=correct / (steps * recipe.batch_size),
            seconds=time.perf_counter() - started,
        )
        if after_epoch is not None:
            after_epoch(state, summary)


def _set_training(network: nn.Module, recipe: Recipe) -> None:
    network.train()
    if recipe.hold_statistics:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
