"""The sensitivity scan: every layer pruned alone, its correctness image by image."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from common.command import cli
from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.machine.workers import ALONE, Workers
from common.network.cascade import Cascade, Recomputation
from common.network.resnet import ResNet18, prunable_layers
from pruning.alone.walk import Chunk, Variants, Walk

# One piece of finished work: all layers at all amounts, on this many batches of images.
CHUNK_BATCHES = 16


@dataclass(frozen=True)
class Scan:
    """What is scanned, and how.

    Attributes:
        model: In eval mode, on the images' device; not changed.
        images: To measure on.
        layers: Each is pruned alone; in network order.
        amounts: Fractions to prune.
        batch_size: In images; batches of 16 keep a CPU's branches in its L3 cache.
        fast: Run the branches in bf16 and the close cases again in FP32.
        workers: The processes that scan together, each a share of every chunk.
    """

    model: ResNet18
    images: ImageSet
    layers: Sequence[str]
    amounts: Sequence[float]
    batch_size: int
    fast: bool
    workers: Workers = ALONE

    def identity(self) -> dict:
        """Return what the results depend on, named for the user."""
        return {
            SCRIPT: "pruning",
            "the checkpoint": checksum(self.model.state_dict().values()),
            "the test images": checksum([self.images.images, self.images.labels]),
            "the layers": list(self.layers),
            "the amounts": list(self.amounts),
            "torch": torch.__version__,
            "the number of threads": torch.get_num_threads(),
            "the batch size": self.batch_size,
            "the precision (--precision)": "bf16 and FP32" if self.fast else "FP32",
            "the device": self.images.images.device.type,
            "the number of processes": self.workers.count,
        }


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


def choose_layers(model: ResNet18, patterns: Sequence[str] | None) -> list[str]:
    """Return the prunable layers that match any pattern (``layer4.*``), in network order.

    Raises:
        UserError: A pattern matches nothing.
    """
    names = list(prunable_layers(model))
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise cli.UserError(f"--layers {pattern}: matches none of {', '.join(names)}")
    return [n for n in names if patterns is None or any(fnmatchcase(n, p) for p in patterns)]


def run_scan(
    scan: Scan, folder: OutputFolder | None = None, resume: bool = False
) -> tuple[ScanResult, float | None]:
    """Scan, and check that the model is as it was before.

    Args:
        scan: What to do.
        folder: Keeps what is finished, in the first of the workers; None in the others.
        resume: Go on with what an earlier run had finished.

    Returns:
        What the scan found, and its seconds; None where part of it was done by an earlier run.

    Raises:
        UserError: The workers have not the same model, images or settings, or what is finished is
            of another scan.
    """
    identity = scan.identity()
    scan.workers.require_same(identity)
    started = time.perf_counter()
    kept = {} if folder is None else folder.keep_unfinished(identity, resume)
    finished = scan.workers.broadcast(dict(kept))
    is_whole = not finished
    result = scan_images(scan, finished if folder is None else kept)
    seconds = time.perf_counter() - started
    if checksum(scan.model.state_dict().values()) != identity["the checkpoint"]:
        raise AssertionError("the scan changed the model")
    if result.recomputation is not None:
        result.recomputation.warn_if_near()
    return result, seconds if is_whole else None


@torch.inference_mode()
def scan_images(scan: Scan, finished: MutableMapping[str, dict]) -> ScanResult:
    """Go through the images once; what is ``finished`` is not done again.

    Memory holds all of the variants' weights and one batch. All workers return all that was found.
    """
    layers, workers, total_images = scan.layers, scan.workers, len(scan.images)
    variants = [Variants.of(scan.model, layers, amount, scan.fast) for amount in scan.amounts]
    walk = Walk(Cascade.of(scan.model, scan.fast))
    if scan.fast:
        walk.bounds = _bounds(walk, variants, scan, finished)
    dense_correct, features, packed, total = [], [], [], Recomputation()
    chunk_size = scan.batch_size * CHUNK_BATCHES * workers.count
    with cli.progress(None, "scan", total=total_images, unit="image") as bar:
        for first in range(0, total_images, chunk_size):
            last = min(first + chunk_size, total_images)
            key = f"images-{first}-{last}"
            chunk = walk.run(
                scan.images.rows(workers.share_of(first, last, scan.batch_size)),
                [] if key in finished else variants,
                scan.batch_size,
                lambda images: bar.update(images * workers.count),
            )
            if workers.count > 1:
                chunk = Chunk.joined(workers.gather(chunk.cpu()))
            dense_correct.append(chunk.dense_correct)
            features.append(chunk.features)
            if key not in finished:
                bits = np.packbits(chunk.correct.cpu().numpy()).tobytes().hex()
                finished[key] = {"correct": bits, "recomputation": asdict(chunk.recomputation)}
            packed.append((finished[key]["correct"], last - first))
            total.add(Recomputation(**finished[key]["recomputation"]))
    rows = len(scan.amounts) * len(layers)
    correct = torch.cat([_unpack(bits, rows, columns) for bits, columns in packed], dim=1)
    names = [(variant.amount, layer) for variant in variants for layer in layers]
    return ScanResult(
        torch.cat(dense_correct).cpu(),
        torch.cat(features).cpu(),
        dict(zip(names, correct, strict=True)),
        {(v.amount, layer): v.achieved[layer] for v in variants for layer in layers},
        total if scan.fast else None,
    )


def _unpack(bits: str, rows: int, columns: int) -> torch.Tensor:
    flat = np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8), count=rows * columns)
    return torch.from_numpy(flat.reshape(rows, columns).astype(bool))


def _bounds(
    walk: Walk, variants: Sequence[Variants], scan: Scan, finished: MutableMapping[str, dict]
) -> dict[float, torch.Tensor]:
    """Measure how far bf16 logits can be off; the same scan, resumed, goes on with the same.

    All workers measure on the same images, and go by what the first has found.
    """
    if "bounds" not in finished:
        bounds = {
            str(v.amount): walk.cascade.measure_bounds(scan.images, v, scan.batch_size).tolist()
            for v in variants
        }
        finished["bounds"] = scan.workers.broadcast(bounds)
    return {v.amount: torch.tensor(finished["bounds"][str(v.amount)]) for v in variants}
