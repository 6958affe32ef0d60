"""The sensitivity scan: every layer pruned alone, its correctness image by image."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from common.command import cli
from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.machine.workers import ALONE, Workers
from common.network.cascade import Cascade, Fp32Recheck
from common.network.execution import Network
from common.network.tracing import trace_network, weight_layers
from pruning.alone.head import Head
from pruning.alone.walk import Chunk, PrunedVariants, Walk

# Unit of partial results: all layers at all amounts, on this many batches of images.
CHUNK_BATCHES = 16


@dataclass(frozen=True)
class Scan:
    """What to scan, and how.

    Attributes:
        model: Network in eval mode, on the images' device; not changed.
        images: Images to measure on.
        layers: Names of the layers to prune, each alone.
        amounts: Fractions to prune.
        batch_size: Images in a batch; batches of 16 keep a CPU's variants in its L3 cache.
        fast: Run the variants in bf16 and the close cases again in FP32.
        workers: Processes that scan together, each a share of every chunk.
    """

    model: nn.Module
    images: ImageSet
    layers: Sequence[str]
    amounts: Sequence[float]
    batch_size: int
    fast: bool
    workers: Workers = ALONE

    @functools.cached_property
    def network(self) -> Network:
        """The model as a graph."""
        return trace_network(self.model, self.images.shape)

    @functools.cached_property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of all layers, in the order of the state dict."""
        layers = weight_layers(self.model, self.network)
        return {name: module.weight.detach() for name, module in layers.items()}

    @functools.cached_property
    def head(self) -> Head | None:
        """The linear layers at the end of the network; None where there are none."""
        return Head.of(self.network, self.weights)

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
    """Result of the scan, image by image in the order of the dataset, on the CPU.

    Attributes:
        dense_correct: Correctness of the dense network, bool, shape (N,).
        features: Input of the head's linear layers, FP32, shape (N, features); without columns
            where there are none.
        correct: For each amount and layer, the correctness, bool, shape (N,).
        achieved: For each amount and layer, the fraction of zeros.
        recheck: Counts of what FP32 checked; None where everything ran in FP32.
    """

    dense_correct: torch.Tensor
    features: torch.Tensor
    correct: dict[tuple[float, str], torch.Tensor]
    achieved: dict[tuple[float, str], float]
    recheck: Fp32Recheck | None


def choose_layers(
    names: Sequence[str], patterns: Sequence[str] | None, own_names: Mapping[str, str]
) -> list[str]:
    """Return the layers that match any pattern (``layer4.*``), in their order.

    Args:
        names: Names of the layers.
        patterns: Patterns of their names, here or in the checkpoint; None for all layers.
        own_names: For a layer its name in the checkpoint, where that may differ.

    Raises:
        UserError: A pattern matches nothing.
    """
    if patterns is None:
        return list(names)

    def matches(name: str, pattern: str) -> bool:
        return any(fnmatchcase(n, pattern) for n in (name, own_names.get(name, name)))

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise cli.UserError(f"--layers {pattern}: matches none of {', '.join(names)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def run_scan(
    scan: Scan, folder: OutputFolder | None = None, resume: bool = False
) -> tuple[ScanResult, float | None]:
    """Scan, and check that the model is unchanged afterwards.

    Args:
        scan: What to scan.
        folder: Folder that keeps partial results, in the first worker; None in the others.
        resume: Continue from the partial results of an earlier run.

    Returns:
        The result, and the scan's seconds; None where an earlier run did part of it.

    Raises:
        UserError: The workers differ in model, images or settings, or the partial results belong
            to another scan.
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
    if result.recheck is not None:
        result.recheck.warn_if_near()
    return result, seconds if is_whole else None


@torch.inference_mode()
def scan_images(scan: Scan, finished: MutableMapping[str, dict]) -> ScanResult:
    """Run all images, but variants only on chunks that are not ``finished``.

    Memory holds the weights of all variants and one batch. Every worker returns the whole result.
    """
    layers, workers, total_images = scan.layers, scan.workers, len(scan.images)
    weights = {name: scan.weights[name] for name in layers}
    variants = [PrunedVariants.of(scan.network, weights, a, scan.fast) for a in scan.amounts]
    cascade = Cascade.of(scan.network, scan.fast)
    bounds = _bounds(cascade, variants, scan, finished) if scan.fast else {}
    walk = Walk(cascade, layers, scan.head.features if scan.head else None, bounds)
    dense_correct, features, correct, total = [], [], [], Fp32Recheck()
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
                finished[key] = {"correct": bits, "recheck": asdict(chunk.recheck)}
            bits = np.frombuffer(bytes.fromhex(finished[key]["correct"]), dtype=np.uint8)
            shape = (len(variants) * len(layers), last - first)
            flat = np.unpackbits(bits, count=math.prod(shape))
            correct.append(torch.from_numpy(flat.reshape(shape).astype(bool)))
            total.add(Fp32Recheck(**finished[key]["recheck"]))
    achieved = {(v.amount, layer): v.achieved[layer] for v in variants for layer in layers}
    return ScanResult(
        torch.cat(dense_correct).cpu(),
        torch.cat(features).cpu(),
        dict(zip(achieved, torch.cat(correct, dim=1), strict=True)),
        achieved,
        total if scan.fast else None,
    )


def _bounds(
    cascade: Cascade,
    variants: Sequence[PrunedVariants],
    scan: Scan,
    finished: MutableMapping[str, dict],
) -> dict[float, torch.Tensor]:
    """Return the bounds for bf16: those of the partial results, or else measure them.

    All workers measure on the same images and use the first worker's bounds.
    """
    if "bounds" not in finished:
        bounds = {
            str(v.amount): cascade.measure_bounds(scan.images, v, scan.batch_size).tolist()
            for v in variants
        }
        finished["bounds"] = scan.workers.broadcast(bounds)
    return {v.amount: torch.tensor(finished["bounds"][str(v.amount)]) for v in variants}
