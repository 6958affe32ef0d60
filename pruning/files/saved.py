"""The pruned model as it is left to use: written, read back, and measured.

A plain checkpoint with the original names, so that every script takes it for ``--weights``. Its
zeros still take four bytes each; what they are worth, any compression of the file shows.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.command.cli import UserError
from common.files.output import replace_file
from common.images.data import normalize
from common.measure.evaluate import Accuracy, Comparison, compare, measure_accuracy
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.checkpoint import load_model, serialize
from common.network.resnet import ResNet18, prunable_layers

# With a search over many layers, its model has the first name, the other search's the second.
PRUNED_NAME = "resnet18_cifar10_pruned.pth"
SLIM_NAME = "resnet18_cifar10_slim.pth"
LINEAR_NAME = "resnet18_cifar10_pruned_linear.pth"
# At most this many predictions of the reloaded model may differ from the search's.
MAX_FLIPS = 1e-3
TIMED_BATCH_SIZE = 16
TIMED_AMOUNT = 0.9


@dataclass(frozen=True)
class Sizes:
    """Bytes of the files of the dense and of the pruned model, plain and through zlib."""

    dense_bytes: int
    dense_compressed_bytes: int
    pruned_bytes: int
    pruned_compressed_bytes: int


def save_pruned(dense: ResNet18, pruned: ResNet18, path: Path) -> tuple[ResNet18, Sizes]:
    """Write the pruned model and read it back: the same tensors, bit for bit.

    Returns:
        What was read, on the CPU, and the sizes of its file and of the dense model's.
    """
    plain, content = (
        serialize({name: t.cpu().contiguous() for name, t in model.state_dict().items()})
        for model in (dense, pruned)
    )
    replace_file(path, lambda file: file.write(content))
    reloaded, state = load_model(path), pruned.state_dict()
    if any(not torch.equal(state[name].cpu(), t) for name, t in reloaded.state_dict().items()):
        raise AssertionError(f"{path.name} gives back other tensors than were saved")
    dense_compressed, compressed = compressed_sizes(plain, path.read_bytes())
    return reloaded, Sizes(len(plain), dense_compressed, path.stat().st_size, compressed)


def compressed_sizes(first: bytes, second: bytes) -> tuple[int, int]:
    """Return the sizes after zlib (level 1: random mantissas gain nothing from more).

    What both begin with is compressed once.
    """
    shorter = min(len(first), len(second))
    one, other = (np.frombuffer(data, np.uint8, shorter) for data in (first, second))
    unlike = np.flatnonzero(one != other)
    shared = int(unlike[0]) if len(unlike) else shorter
    stream, sizes = zlib.compressobj(level=1), []
    begun = len(stream.compress(memoryview(first)[:shared]))
    for data in (first, second):
        rest = stream.copy()
        sizes.append(begun + len(rest.compress(memoryview(data)[shared:])) + len(rest.flush()))
    return tuple(sizes)


# --- accuracy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confirmation:
    """What the reloaded model gets right, and on how many images the search said otherwise."""

    accuracy: Accuracy
    comparison: Comparison
    images_unlike_search: int

    @classmethod
    def of(
        cls, correct: torch.Tensor, expected: torch.Tensor, dense_correct: torch.Tensor
    ) -> Confirmation:
        """Hold the reloaded model's per-image correctness against what the search ``expected``.

        Raises:
            UserError: More than 1 image in 1,000 differs.
        """
        unlike = int((correct != expected).sum())
        if unlike > max(1, MAX_FLIPS * len(correct)):
            raise UserError(f"the reloaded model differs from the search on {unlike} images")
        return cls(measure_accuracy(correct), compare(dense_correct, correct), unlike)

    def as_dict(self) -> dict:
        """Return it as results.json has it."""
        return {
            "accuracy": self.accuracy.as_dict(),
            "comparison": self.comparison.as_dict(),
            "images_unlike_search": self.images_unlike_search,
        }


# --- speed ---------------------------------------------------------------------------------------


@torch.no_grad()
def zero_everywhere(model: ResNet18) -> ResNet18:
    """Return a copy, on the CPU, without ``TIMED_AMOUNT`` of every layer: which is all the same."""
    sparse = copy.deepcopy(model).cpu()
    for layer in prunable_layers(sparse).values():
        layer.weight.flatten()[: round(TIMED_AMOUNT * layer.weight.numel())] = 0
    return sparse


def time_zeros(dense: ResNet18, sparse: ResNet18, images: torch.Tensor) -> tuple[Timing, Timing]:
    """Time two models in turns on the CPU, on some of the uint8 ``images``: dense, sparse."""
    contenders = []
    for name, model in (("dense", dense), ("sparse", sparse)):
        laid_out = copy.deepcopy(model).cpu().to(memory_format=torch.channels_last)
        contenders.append(Contender(name, torch.inference_mode()(laid_out)))
    batch = normalize(images[:TIMED_BATCH_SIZE].cpu())
    timings = time_interleaved(contenders, batch, (TIMED_BATCH_SIZE,), seconds_per_batch_size=1.5)
    return timings["dense"][0], timings["sparse"][0]
