"""The state of a training run: the network, its optimizer and the epochs done."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from training.recipe import Recipe

ADAM_BETAS = (0.9, 0.99)  # 0.999 would average over all steps of a short run


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
