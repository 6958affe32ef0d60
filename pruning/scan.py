"""The sensitivity scan: every layer pruned alone, its correctness image by image.

Each batch runs through the dense network once and every pruned variant branches off it
(:mod:`common.branching`), in bf16 where that is fast, with FP32's predictions
(:mod:`common.cascade`).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from common import cli
from common.branching import Convolution, trace_dense
from common.cascade import Branches, Cascade, Recomputation
from common.data import Cifar10, normalize
from common.model import ResNet18, prunable_layers
from common.workers import ALONE, Workers
from pruning.masks import prune_weight, sparsity

# One entry of the journal: all layers at all amounts, on this many batches of images.
CHUNK_BATCHES = 16


@dataclass(frozen=True)
class Variants(Branches):
    """The network with each of some layers pruned alone by one amount.

    Attributes:
        amount: Fraction asked for.
        achieved: For each layer, in network order, the fraction of zeros.
    """

    amount: float
    achieved: dict[str, float]

    @classmethod
    def of(cls, model: ResNet18, layers: Sequence[str], amount: float, fast: bool) -> Variants:
        """Prune each of ``layers`` of ``model``, which is not changed and may be on any device."""
        device = model.linear.weight.device
        exact, achieved = {}, {}
        for name in layers:
            module = prunable_layers(model)[name]
            weight = prune_weight(module.weight.cpu(), amount)
            achieved[name] = sparsity(weight)
            weight = weight.to(device)
            if isinstance(module, nn.Conv2d):
                norm = model.get_submodule(norm_of(name))
                exact[name] = Convolution.folded(module, norm, weight)
            else:
                exact[name] = weight
        if not fast:
            return cls(exact, None, amount, achieved)
        rounded = {
            name: part.to(torch.bfloat16) if isinstance(part, Convolution) else part
            for name, part in exact.items()
        }
        return cls(exact, rounded, amount, achieved)


def norm_of(convolution: str) -> str:
    """Return the name of the batch norm after a convolution: conv1 → bn1, shortcut.0 → .1."""
    stem, _, last = convolution.rpartition(".")
    return f"{stem}.1" if last == "0" else convolution.replace("conv", "bn")


@dataclass(frozen=True)
class ScanResult:
    """What the scan found, image by image, in the order of the dataset; on the CPU.

    Attributes:
        dense_correct: bool, shape (N,).
        features: FP32, shape (N, channels): the linear layer's input.
        correct: For each amount and layer: bool, shape (N,).
        achieved: For each amount and layer the fraction of zeros.
        recomputation: None where all ran in FP32.
    """

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: dict[tuple[float, str], torch.Tensor]
    achieved: dict[tuple[float, str], float]
    recomputation: Recomputation | None


@torch.inference_mode()
def scan(
    model: ResNet18,
    dataset: Cifar10,
    layers: Sequence[str],
    amounts: Sequence[float],
    journal: MutableMapping[str, dict],
    batch_size: int,
    fast: bool,
    workers: Workers = ALONE,
) -> ScanResult:
    """Prune each of ``layers`` alone by each of ``amounts`` and classify every image.

    Work that the journal holds is not done again, but for the dense network's run, which gives
    the features. Memory holds the images, the features, the variants' weights and one batch.
    Several ``workers`` share each chunk by batches, and all of them return all that was found.

    Args:
        model: In eval mode, on the dataset's device; not changed.
        dataset: The images.
        layers: In network order.
        amounts: Fractions.
        journal: Finished chunks are written to it; of the same content in all workers.
        batch_size: In images; batches of 16 keep a CPU's branches in its L3 cache.
        fast: Run the branches in bf16 and the close cases again in FP32.
        workers: The processes that scan together.
    """
    variants = [Variants.of(model, layers, amount, fast) for amount in amounts]
    walk = Walk(Cascade.of(model, fast))
    if fast:
        walk.bounds = _journalled_bounds(walk, variants, dataset, batch_size, journal, workers)
    dense_correct, features, packed, total = [], [], [], Recomputation()
    chunk_size = batch_size * CHUNK_BATCHES * workers.count
    with cli.progress(None, "scan", total=len(dataset), unit="image") as bar:
        for first in range(0, len(dataset), chunk_size):
            last = min(first + chunk_size, len(dataset))
            key = f"images {first}-{last}"
            chunk = walk.run(
                dataset.rows(workers.share_of(first, last, batch_size)),
                [] if key in journal else variants,
                batch_size,
                lambda images: bar.update(images * workers.count),
            )
            if workers.count > 1:
                chunk = Chunk.joined(workers.gather(chunk.cpu()))
            dense_correct.append(chunk.dense_correct)
            features.append(chunk.features)
            if key not in journal:
                bits = np.packbits(chunk.correct.cpu().numpy()).tobytes().hex()
                journal[key] = {"correct": bits, "recomputation": asdict(chunk.recomputation)}
            packed.append((journal[key]["correct"], last - first))
            total.add(Recomputation(**journal[key]["recomputation"]))
    correct = torch.cat([_unpack(bits, len(amounts) * len(layers), n) for bits, n in packed], dim=1)
    names = [(variant.amount, layer) for variant in variants for layer in layers]
    return ScanResult(
        torch.cat(dense_correct).cpu(),
        torch.cat(features).cpu(),
        dict(zip(names, correct, strict=True)),
        {(v.amount, layer): v.achieved[layer] for v in variants for layer in layers},
        total if fast else None,
    )


def _unpack(bits: str, rows: int, columns: int) -> torch.Tensor:
    flat = np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8), count=rows * columns)
    return torch.from_numpy(flat.reshape(rows, columns).astype(bool))


def _journalled_bounds(
    walk: Walk,
    variants: Sequence[Variants],
    dataset: Cifar10,
    batch_size: int,
    journal: MutableMapping[str, dict],
    workers: Workers,
) -> dict[float, torch.Tensor]:
    """Measure how far bf16 logits can be off; the same scan, resumed, goes on with the same.

    All workers measure on the same images, and go by what the first has found.
    """
    if "bounds" not in journal:
        bounds = {
            str(v.amount): walk.cascade.measure_bounds(dataset, v, batch_size).tolist()
            for v in variants
        }
        journal["bounds"] = workers.broadcast(bounds)
    return {v.amount: torch.tensor(journal["bounds"][str(v.amount)]) for v in variants}


@dataclass(frozen=True)
class Chunk:
    """A part of the scan: correctness (variants, n) and what the dense network gave, (n,)."""

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: torch.Tensor
    recomputation: Recomputation

    def cpu(self) -> Chunk:
        """Return the chunk with its tensors in main memory."""
        tensors = (self.dense_correct, self.features, self.correct)
        return Chunk(*(tensor.cpu() for tensor in tensors), self.recomputation)

    @classmethod
    def joined(cls, shares: Sequence[Chunk]) -> Chunk:
        """Put the workers' shares together, in the order of the images."""
        shares = [share for share in shares if len(share.features)]  # few images, many workers
        recomputation = Recomputation()
        for share in shares:
            recomputation.add(share.recomputation)
        return cls(
            torch.cat([share.dense_correct for share in shares]),
            torch.cat([share.features for share in shares]),
            torch.cat([share.correct for share in shares], dim=1),
            recomputation,
        )


@dataclass
class Walk:
    """The network and, for each amount, the bf16 margins below which FP32 decides."""

    cascade: Cascade
    bounds: dict[float, torch.Tensor] = field(default_factory=dict)

    def run(
        self,
        dataset: Cifar10,
        variants: Sequence[Variants],
        batch_size: int,
        report: Callable[[int], object],
    ) -> Chunk:
        """Run the dense network and all variants; nothing here waits for a GPU."""
        dense_correct, features, correct, recomputation = [], [], [], Recomputation()
        for start in range(0, len(dataset), batch_size):
            images = dataset.images[start : start + batch_size]
            labels = dataset.labels[start : start + batch_size]
            trace = trace_dense(self.cascade.network, normalize(images))
            features.append(trace.features)
            dense = self.cascade.network.classify(trace.features)
            dense_correct.append(dense.argmax(dim=1) == labels)
            found = [
                self.cascade.predict(trace, v, self.bounds.get(v.amount), recomputation)
                for v in variants
            ]
            correct += [torch.cat(found) == labels] if found else []
            report(len(images))
        return Chunk(
            torch.cat(dense_correct) if dense_correct else dataset.labels.bool(),
            torch.cat(features) if features else dataset.labels.float(),
            torch.cat(correct, dim=1) if correct else torch.empty(0, len(dataset)),
            recomputation,
        )
