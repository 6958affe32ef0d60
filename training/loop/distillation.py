"""Distillation: a compressed network learns to answer as the network that it was made from does.

The teacher's logits say how alike the classes are, and go on saying it where images are shifted,
bent and pasted into one another; no labels are needed (Hinton et al., 2015,
https://arxiv.org/abs/1503.02531; Beyer et al., 2022, https://arxiv.org/abs/2106.05237). On images
that the teacher was trained on they say little else than the class, so what its blocks give is
imitated too (Romero et al., 2015, https://arxiv.org/abs/1412.6550).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.images.data import Cifar10
from common.inputs import Inputs
from common.machine.workers import Workers
from common.network.resnet import BLOCKS, ResNet18, hooked, prunable_layers
from training.loop.fit import Loss, choose_precision, fit
from training.loop.state import TrainingState
from training.recipe import Recipe

TEMPERATURE = 3.0
SMALLEST_SQUARE = 1e-6  # that a block's error is a share of: a block may give zeros alone
# A student starts close to its teacher: it is to mend, not to learn anew. A higher rate first
# undoes what reconstruction has repaired, and so do batch norms that follow each batch.
RECIPE = Recipe(
    epochs=1, batch_size=64, learning_rate=5e-5, warmup=0.1, optimizer="adam", weight_decay=0.0,
    cutmix=0.5, jitter=0.5, hold_statistics=True,
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What compressed networks learn from, to do as the dense one does.

    Attributes:
        images: Training images, on the device to train on; their labels are not used.
        epochs: Passes over them.
    """

    images: Cifar10
    epochs: int

    @classmethod
    def read(
        cls, inputs: Inputs, epochs: int | None, count: int | None, device: torch.device
    ) -> Training | None:
        """Read ``count`` images to ``device``, None for all; return None for no epochs.

        Raises:
            UserError: There are too few.
        """
        return cls(inputs.load_training(count).to(device), epochs) if epochs else None


def distill(
    student: ResNet18,
    teacher: ResNet18,
    training: Training,
    seed: int,
    learning_rate: float = RECIPE.learning_rate,
    precision: str | None = None,
) -> None:
    """Train ``student`` (changed in place, left in eval mode) to do as the teacher does.

    Its weights that are zero stay zero.

    Args:
        student: In any mode, on any device; moved to that of the images. Its blocks give as many
            channels as the teacher's.
        teacher: In eval mode, on the device of the images.
        training: What to learn from.
        seed: Of order and augmentation.
        learning_rate: The highest; all else is the recipe's.
        precision: ``bf16`` or ``fp32``; by default what the device is fast in.

    Raises:
        UserError: The loss is no longer finite.
    """
    train, device = training.images, training.images.images.device
    recipe = dataclasses.replace(
        RECIPE,
        epochs=training.epochs,
        learning_rate=learning_rate,
        batch_size=min(RECIPE.batch_size, len(train)),
        precision=precision or choose_precision(device),
    )
    state = TrainingState.start(student, recipe, device)
    with imitation_loss(student, teacher) as loss:
        fit(state, train, recipe, seed, Workers(device), loss, hold_zeros(student))
    student.eval()


def hold_zeros(model: ResNet18) -> Callable[[nn.Module], None]:
    """Return what sets the weights that are zero in ``model`` now to zero again."""
    zeros = {name: layer.weight == 0 for name, layer in prunable_layers(model).items()}

    @torch.no_grad()
    def apply(model: nn.Module) -> None:
        for name, layer in prunable_layers(model).items():
            layer.weight.masked_fill_(zeros[name], 0)

    return apply


@contextlib.contextmanager
def imitation_loss(student: ResNet18, teacher: ResNet18) -> Iterator[Loss]:
    """Provide the loss of ``student``: how far it is from the teacher, in its blocks and logits.

    The labels have no say.
    """
    given: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}

    def loss(images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answers = teacher(images)
        return divergence(logits, answers) + block_error(given, wanted)

    with _recorded(student, given), _recorded(teacher, wanted):
        yield loss


def divergence(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the mean divergence of softened logits (n, classes) from the teacher's answers.

    Its gradient shrinks with the square of the temperature, which is made up for.
    """
    student, teacher = ((x.float() / TEMPERATURE).log_softmax(1) for x in (logits, answers))
    return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def block_error(
    given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the squared error of the blocks' outputs in shares of their squares, their mean."""
    errors = [
        F.mse_loss(given[name].float(), output.float())
        / output.float().square().mean().clamp_min(SMALLEST_SQUARE)
        for name, output in wanted.items()
    ]
    return torch.stack(errors).mean()


def _recorded(network: ResNet18, outputs: dict[str, torch.Tensor]):
    """Keep in ``outputs`` what each block gives, run by run."""

    def keep(name: str, block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        outputs[name] = output

    return hooked({name: network.get_submodule(name) for name in BLOCKS}, keep)
