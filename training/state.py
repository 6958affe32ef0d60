"""The state of a training run: the network, the average of its weights, and the optimizer's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from training.recipe import Recipe


@dataclass
class TrainingState:
    """All that the next step depends on, recipe, images and seed aside.

    Attributes:
        model: The network being trained, changed in place.
        average: The same network with the moving average of the weights; its batch-norm statistics
            are not kept up (see :mod:`training.averaging`).
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
