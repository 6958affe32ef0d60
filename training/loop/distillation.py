"""Distillation: a compressed network learns to imitate the network that it was made from.

The student learns the teacher's logits on augmented images, without labels (Hinton et al., 2015,
https://arxiv.org/abs/1503.02531; Beyer et al., 2022, https://arxiv.org/abs/2106.05237). On images
that the teacher was trained on, its logits say little more than the class, so the student also
learns the outputs of the teacher's blocks (Romero et al., 2015, https://arxiv.org/abs/1412.6550).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.images.data import ImageSet
from common.inputs import Inputs
from common.machine.workers import Workers
from common.network.hooks import hooked
from common.network.tracing import Traced, trace, weight_layers
from training.loop.fit import Loss, TrainingState, choose_precision, fit
from training.recipe import Recipe

Channels = Mapping[str, torch.Tensor]

TEMPERATURE = 3.0
SMALLEST_SQUARE = 1e-6  # lower bound of the mean square that a block's error is divided by
# A student starts close to its teacher. A higher learning rate first undoes what the repair of
# removed channels has achieved, and so do batch norms that follow each batch.
RECIPE = Recipe(
    epochs=1, batch_size=64, learning_rate=5e-5, warmup=0.1, optimizer="adam", weight_decay=0.0,
    cutmix=0.5, jitter=0.5, hold_statistics=True,
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What compressed networks are trained on."""

    images: ImageSet  # on the device to train on; labels are not used
    epochs: int  # number of passes over the images

    @classmethod
    def read(
        cls, inputs: Inputs, epochs: int | None, count: int | None, device: torch.device
    ) -> "Training | None":
        """Read ``count`` images to ``device``, None for all; return None for no epochs."""
        if epochs is None:
            return None
        return cls(inputs.load_training(count, flag="--finetune-images").to(device), epochs)


def distill(
    student: nn.Module, teacher: nn.Module, training: Training, seed: int,
    learning_rate: float = RECIPE.learning_rate, precision: str | None = None,
    channels: Channels | None = None,
) -> None:  # fmt: skip
    """Train a student in place to imitate its teacher; weights that are zero stay zero.

    The student has the teacher's modules; for each narrower layer ``channels`` holds the teacher's
    channels that are left. It moves to the images' device, where the teacher is, and ends in eval
    mode. The default ``precision`` is the device's fast one. A loss not finite is a UserError.
    """
    train, device = training.images, training.images.images.device
    recipe = dataclasses.replace(
        RECIPE, epochs=training.epochs, learning_rate=learning_rate,
        batch_size=min(RECIPE.batch_size, len(train)),
        precision=precision or choose_precision(device),
    )  # fmt: skip
    traced = trace(teacher, train.shape)
    state = TrainingState.start(student, recipe, device)
    keep_zeros = hold_zeros(weight_layers(student, traced.network))
    blocks = _block_channels(traced, channels or {})
    with imitation_loss(student, teacher, blocks) as loss:
        fit(state, train, recipe, seed, Workers(device), loss, keep_zeros)
    student.eval()


def _block_channels(traced: Traced, channels: Channels) -> dict[str, torch.Tensor | None]:
    """Return for each block which output channels the student has; None for all.

    A block's outputs are a sum that its last layer adds to, so they have that layer's channels.
    """
    found = {}
    for block in traced.blocks:
        layers = [name for name in traced.network.graph.layers if name.startswith(f"{block}.")]
        found[block] = channels.get(layers[-1]) if layers else None
    return found


def hold_zeros(layers: Mapping[str, nn.Module]) -> Callable[[nn.Module], None]:
    """Return a function that sets the weights that are zero now to zero again."""
    zeros = {name: layer.weight == 0 for name, layer in layers.items()}

    @torch.no_grad()
    def apply(model: nn.Module) -> None:
        for name, zero in zeros.items():
            model.get_submodule(name).weight.masked_fill_(zero, 0)

    return apply


@contextlib.contextmanager
def imitation_loss(
    student: nn.Module, teacher: nn.Module, blocks: Mapping[str, torch.Tensor | None]
) -> Iterator[Loss]:
    """Provide the loss: divergence of the logits, and error of the outputs of some modules.

    ``blocks`` holds for each module the teacher's channels that the student has; None for all.
    """
    given: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}

    def loss(images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answers = teacher(images)
        lost = divergence(logits, answers)
        kept = {n: w if blocks[n] is None else w[:, blocks[n]] for n, w in wanted.items()}
        return lost + block_error(given, kept) if kept else lost

    with _recorded(student, blocks, given), _recorded(teacher, blocks, wanted):
        yield loss


def divergence(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the mean divergence of softened logits (n, classes) from the teacher's answers.

    Its gradient shrinks with the square of the temperature, so it is scaled by that square.
    """
    student, teacher = ((x.float() / TEMPERATURE).log_softmax(1) for x in (logits, answers))
    return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def block_error(
    given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the mean over blocks of the squared error, relative to the squares of ``wanted``."""
    errors = []
    for name, output in wanted.items():
        square = output.float().square().mean().clamp_min(SMALLEST_SQUARE)
        errors.append(F.mse_loss(given[name].float(), output.float()) / square)
    return torch.stack(errors).mean()


def _recorded(network: nn.Module, blocks: Iterable[str], outputs: dict[str, torch.Tensor]):
    """Keep the blocks' outputs in ``outputs``, run by run."""

    def keep(name: str, block: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = output

    return hooked({name: network.get_submodule(name) for name in blocks}, keep)
