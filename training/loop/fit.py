"""The training loop, and the state that it changes.

    state = TrainingState.start(model, recipe, device)
    fit(state, images, recipe, seed=0, workers=Workers(device))

A ``loss`` serves another aim than the labels, such as a teacher's answers.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.command.cli import UserError, progress
from common.images.data import MAX_BYTES_IN_MEMORY, ImageSet
from common.machine.device import bf16_pays
from common.machine.workers import Workers
from training.loop.augment import make_batch, plan_epoch
from training.recipe import Recipe

ADAM_BETAS = (0.9, 0.99)  # 0.999 would average over all steps of a short run
# Maps normalised images, logits and class probabilities to the mean loss.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class TrainingState:
    """What the next step depends on, apart from recipe, images and seed."""

    model: nn.Module  # trained in place
    optimizer: torch.optim.Optimizer  # only the momentum of SGD can be saved and loaded
    epochs_done: int = 0

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, device: torch.device) -> "TrainingState":
        """Return the state before the first step; ``model`` is moved to ``device``."""
        model.to(device, memory_format=torch.channels_last)
        return cls(model, make_optimizer(model, recipe))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights, batch-norm statistics and momentum by name, for a checkpoint."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            found[f"momentum.{name}"] = torch.zeros_like(parameter) if buffer is None else buffer
        return found

    def load(self, tensors: Mapping[str, torch.Tensor], epochs_done: int) -> None:
        """Copy the tensors of a saved state; a ValueError, and no change, if they do not fit."""
        own = self.tensors()
        for name in own.keys() | tensors.keys():
            found, expected = tensors.get(name), own.get(name)
            if found is None or expected is None:
                raise ValueError(f"{name} is {'missing' if found is None else 'unexpected'}")
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}")
            if not found.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values")
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(tensors[f"model.{name}"])
            for name, parameter in self.model.named_parameters():
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                self.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.epochs_done = epochs_done


@dataclass(frozen=True)
class EpochSummary:
    """Results of one epoch."""

    epoch: int
    learning_rate: float
    loss: float
    train_accuracy: float  # on augmented images, during training
    seconds: float
    held_out_accuracy: float | None = None  # after the epoch, where it is measured


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; only weights of layers decay, not vectors."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=ADAM_BETAS)
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
        fused=weights[0].is_cuda,
    )  # fmt: skip


def choose_precision(device: torch.device) -> str:
    """Return ``bf16`` where a device's convolutions and products are fast in it, else ``fp32``."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and bf16_pays()
    return "bf16" if fast else "fp32"


def fit(
    state: TrainingState, train: ImageSet, recipe: Recipe, seed: int, workers: Workers,
    loss: Loss | None = None, after_step: Callable[[nn.Module], None] | None = None,
    after_epoch: Callable[[TrainingState, EpochSummary], None] | None = None,
) -> None:  # fmt: skip
    """Train from where ``state`` is, which is changed in place, to the recipe's last epoch.

    The images are on the device of the ``workers``, which share each batch. ``seed`` draws their
    order and the augmentation. The ``loss`` is by default the cross-entropy, with labels smoothed
    as the recipe says. ``after_step`` is called with the network.

    Raises:
        UserError: There are fewer images than a batch takes, the images are not square, the
            processes cannot share a batch equally, or the loss is no longer finite.
    """
    _check(train, recipe.batch_size, workers.count)
    # Gradients are averaged over the processes. Each normalises its own images; the batch-norm
    # statistics of the first are kept.
    network = DistributedDataParallel(state.model) if workers.count > 1 else state.model
    cross_entropy = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    loss = loss or (lambda images, logits, targets: cross_entropy(logits, targets))
    is_bf16 = recipe.precision == "bf16"
    pixels = train.images.permute(0, 2, 3, 1)
    if pixels.numel() <= MAX_BYTES_IN_MEMORY:
        pixels = pixels.contiguous()  # for gathers
    steps = len(train) // recipe.batch_size  # images that are left over wait for the next shuffle
    while state.epochs_done < recipe.epochs:
        started, epoch = time.perf_counter(), state.epochs_done
        plan = plan_epoch(len(train), pixels.shape[1], recipe, seed, epoch, pixels.device)
        totals = torch.zeros(2, device=pixels.device)  # loss, correct: read once, at the end
        _set_training(network, recipe)
        for step in progress(range(steps), f"epoch {epoch + 1}/{recipe.epochs}"):
            rate = recipe.learning_rate_at((epoch + (step + 0.5) / steps) / recipe.epochs)
            first = step * recipe.batch_size
            rows = workers.share_of(first, first + recipe.batch_size)
            images, targets = make_batch(train, pixels, plan, rows)
            totals += _step(network, state.optimizer, images, targets, loss, rate, is_bf16)
            if after_step is not None:
                after_step(state.model)
        total_loss, correct = torch.stack(workers.gather(totals.cpu())).sum(0).tolist()
        if not math.isfinite(total_loss):
            raise UserError(f"the loss is {total_loss} in epoch {epoch + 1}; try a lower learning "
                            "rate")  # fmt: skip
        state.epochs_done += 1
        if after_epoch is not None:
            seconds = time.perf_counter() - started
            mean_loss = total_loss / (steps * workers.count)
            accuracy = correct / (steps * recipe.batch_size)
            after_epoch(state, EpochSummary(epoch + 1, rate, mean_loss, accuracy, seconds))


def _check(train: ImageSet, batch_size: int, processes: int) -> None:
    if batch_size % processes:
        raise UserError(f"{processes} processes cannot share a batch of {batch_size}")
    if batch_size > len(train):
        raise UserError(f"a batch of {batch_size} from only {len(train)} training images")
    if train.shape[1] != train.shape[2]:
        raise UserError("training needs square images: --image-size cuts them")


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor,
    targets: torch.Tensor, loss: Loss, rate: float, is_bf16: bool,
) -> torch.Tensor:  # fmt: skip
    """Update the network once; return loss and number of correct images, (2,)."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_bf16):
        logits = network(images)
        lost = loss(images, logits, targets)
    optimizer.zero_grad(set_to_none=True)
    lost.backward()
    optimizer.step()
    correct = (logits.argmax(1) == targets.argmax(1)).sum()
    return torch.stack((lost.detach().float(), correct.float()))


def _set_training(network: nn.Module, recipe: Recipe) -> None:
    network.train()
    for module in network.modules() if recipe.hold_statistics else ():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
