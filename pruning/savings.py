"""What the pruned model saves, measured: its files written and read back, its zeros timed."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from common.checkpoint import read_checkpoint, save_checkpoint
from common.cli import UserError
from common.data import Cifar10, normalize
from common.evaluate import compare, measure_accuracy, predict
from common.latency import Contender, time_interleaved
from common.model import ResNet18, prunable_layers
from common.workers import ALONE, Workers
from pruning import artifacts
from pruning.masks import l1_mask, prune_model, pruned_count

# At most this many predictions of the reloaded model may differ from the search's.
MAX_FLIPS = 1e-3
TIMED_BATCH_SIZE = 16
TIMED_AMOUNT = 0.9


def prune_linear(model: ResNet18, pruned_weights: int) -> ResNet18:
    """Return a copy, on the CPU, without the linear layer's ``pruned_weights`` smallest weights."""
    pruned = copy.deepcopy(model).cpu()
    prune_model(pruned, {"linear": l1_mask(pruned.linear.weight, pruned_weights)})
    return pruned


def save_artifacts(model: ResNet18, pruned: ResNet18, plain: Path, packed: Path) -> dict:
    """Write the pruned model, plain and packed; return their real bytes, and the dense model's.

    Both are read back: each must give the same tensors, bit for bit.
    """
    state = {name: t.cpu().contiguous() for name, t in pruned.state_dict().items()}
    dense = plain.with_name(".dense.pth")
    save_checkpoint({name: t.cpu().contiguous() for name, t in model.state_dict().items()}, dense)
    save_checkpoint(state, plain)
    artifacts.save_packed(state, packed)
    for path, read in ((plain, read_checkpoint), (packed, artifacts.load_packed)):
        reloaded = read(path)
        if any(not torch.equal(reloaded[key], tensor) for key, tensor in state.items()):
            raise AssertionError(f"{path.name} gives back other tensors than were saved")
    sizes = {
        "dense_bytes": dense.stat().st_size,
        "dense_compressed_bytes": artifacts.compressed_bytes(dense),
        "pruned_bytes": plain.stat().st_size,
        "pruned_compressed_bytes": artifacts.compressed_bytes(plain),
        "packed_bytes": packed.stat().st_size,
    }
    dense.unlink()
    return sizes


def predict_together(
    pruned: ResNet18 | None, dataset: Cifar10, batch_size: int, workers: Workers
) -> torch.Tensor:
    """Return the reloaded pruned model's predictions (int64, shape (N,)), made by all workers.

    The first of them has the model, and sends it to the others, which pass None.
    """
    pruned = workers.broadcast(pruned).to(dataset.images.device)
    return predict(pruned, dataset, batch_size, "confirm", workers)


def confirm(
    pruned: ResNet18,
    dataset: Cifar10,
    features: torch.Tensor,
    dense_correct: torch.Tensor,
    batch_size: int,
    workers: Workers = ALONE,
) -> dict:
    """Run the reloaded pruned model on every image, and hold it against the search's prediction.

    The other ``workers``, if any, must call :func:`predict_together`.

    Raises:
        UserError: More than 1 prediction in 1,000 differs from what the features gave.
    """
    labels = dataset.labels.cpu()
    correct = predict_together(pruned, dataset, batch_size, workers) == labels
    weight, bias = pruned.linear.weight.detach().cpu(), pruned.linear.bias.detach().cpu()
    expected = (features @ weight.T + bias).argmax(dim=1) == labels
    different = int((expected != correct).sum())
    check_flips(different, len(labels))
    return {
        "accuracy": measure_accuracy(correct).as_dict(),
        "comparison": compare(dense_correct, correct).as_dict(),
        "images_unlike_search": different,
    }


def check_flips(different: int, total: int) -> None:
    """Raise UserError where the reloaded model is not the one that the search measured."""
    if different > max(1, MAX_FLIPS * total):
        raise UserError(f"the reloaded model differs from the search on {different} images")


def prune_everywhere(model: ResNet18, amount: float) -> ResNet18:
    """Return a copy, on the CPU, without a fraction ``amount`` of every layer."""
    pruned = copy.deepcopy(model).cpu()
    masks = {
        name: l1_mask(layer.weight, pruned_count(layer.weight.numel(), amount))
        for name, layer in prunable_layers(pruned).items()
    }
    prune_model(pruned, masks)
    return pruned


def time_zeros(model: ResNet18, sparse: ResNet18, name: str, dataset: Cifar10) -> list[dict]:
    """Time the dense model against a sparse one, called ``name``, on the CPU."""
    images = normalize(dataset.images[:TIMED_BATCH_SIZE].cpu())
    contenders = []
    for label, contender in (("dense", model), (name, sparse)):
        laid_out = copy.deepcopy(contender).cpu().to(memory_format=torch.channels_last)
        contenders.append(Contender(label, torch.inference_mode()(laid_out)))
    timings = time_interleaved(contenders, images, (TIMED_BATCH_SIZE,), seconds_per_batch_size=1.5)
    return [{"name": name, **entries[0].as_dict()} for name, entries in timings.items()]


def measure_savings(sizes: dict, structure: dict, model: ResNet18, dataset: Cifar10) -> dict:
    """Return results.json's ``savings``: bytes, the linear layer's share, and the times."""
    weights = structure["conv_weights"] + structure["linear_weights"]
    sparse = prune_everywhere(model, TIMED_AMOUNT)
    name = f"{100 * TIMED_AMOUNT:g} % zeros everywhere"
    return sizes | {
        "linear_share": structure["linear_weights"] / weights,
        "latency": time_zeros(model, sparse, name, dataset),
    }
