"""The training loop: any network on any CIFAR-10 images, epoch by epoch.

    state = TrainingState.start(model, recipe, device)
    fit(state, images, recipe, seed=0, workers=Workers(device))

``after_step`` is for what must hold after every step, such as the mask of a pruned network;
``after_epoch`` is for measuring and saving.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

from common import cli
from common.cli import UserError
from common.data import Cifar10
from common.sources import IMAGE_SIZE
from common.workers import Workers
from training.augment import make_batch, plan_epoch, resize
from training.recipe import Recipe

AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_NORM_BATCH, BATCH_NORM_IMAGES = 500, 5000


@dataclass(frozen=True)
class EpochSummary:
    """What one epoch of training came to; accuracy is that on augmented images, while learning."""

    epoch: int
    image_size: int
    learning_rate: float
    loss: float
    train_accuracy: float
    seconds: float


@dataclass
class TrainingState:
    """All that the next step depends on, recipe, images and seed aside.

    Attributes:
        model: The network being trained, changed in place.
        average: The same network with the moving average of the weights; its batch-norm statistics
            are not kept up (see :func:`averaged_model`).
        optimizer: Holds the momentum.
        scaler: Of the loss, for FP16; does nothing in other precisions.
        epochs_done: Finished epochs.
        steps_done: Finished steps.
    """

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epochs_done: int = 0
    steps_done: int = 0

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, device: torch.device) -> TrainingState:
        """Return the state before the first step; ``model`` is moved to ``device``."""
        model.to(device, memory_format=torch.channels_last)
        return cls(
            model=model,
            average=copy.deepcopy(model).requires_grad_(False),
            optimizer=make_optimizer(model, recipe),
            scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
        )

    def state_dict(self) -> dict:
        """Return the state as tensors and plain values, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epochs_done": self.epochs_done,
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a state from :meth:`state_dict`."""
        for name in ("model", "average", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.epochs_done, self.steps_done = state["epochs_done"], state["steps_done"]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; only weights of layers decay, not vectors."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=weights[0].is_cuda,
    )


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
        _update_average(state, recipe)
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


def _update_average(state: TrainingState, recipe: Recipe) -> None:
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


def choose_precision(device: torch.device) -> str:
    """Return the precision that ``device`` is fast in: ``bf16``, ``fp16`` or ``fp32``."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which convolutions and products run in ``precision``."""
    return torch.autocast(
        device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32"
    )
