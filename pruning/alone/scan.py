"""The sensitivity scan: every layer pruned alone, its correctness image by image.

It walks over the images in chunks, which an interrupted run keeps. Each batch runs through the
dense network once, and every pruned variant branches off it (:mod:`common.network.branching`), in
bf16 where that is fast, with FP32's predictions (:mod:`common.network.cascade`).
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from common.command import cli
from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.machine.workers import ALONE, Workers
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.execution import Network
from common.network.tracing import trace_network, weight_layers
from pruning.alone.head import Head
from pruning.masks import l1_masks, masked_layers

# Unit of partial results: all layers at all amounts, on this many batches of images.
CHUNK_BATCHES = 16


@dataclass(frozen=True)
class Scan:
    """What to scan, and how."""

    model: nn.Module  # network in eval mode, on the images' device; not changed
    images: ImageSet  # images to measure on
    layers: Sequence[str]  # names of the layers to prune, each alone
    amounts: Sequence[float]  # fractions to prune
    batch_size: int  # images in a batch; batches of 16 keep a CPU's variants in its L3 cache
    fast: bool  # run the variants in bf16 and the close cases again in FP32
    workers: Workers = ALONE  # processes that scan together, each a share of every chunk

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
    """Result of the scan, image by image in the order of the dataset, on the CPU."""

    dense_correct: torch.Tensor  # correctness of the dense network, bool, shape (N,)
    # Input of the head's linear layers, FP32, shape (N, features); without columns where there are
    # none.
    features: torch.Tensor
    # For each amount and layer, the correctness, bool, shape (N,).
    correct: dict[tuple[float, str], torch.Tensor]
    recheck: Fp32Recheck | None  # counts of what FP32 checked; None where everything ran in FP32


def choose_layers(
    names: Sequence[str], patterns: Sequence[str] | None, own_names: Mapping[str, str]
) -> list[str]:
    """Return the layers that match any pattern (``layer4.*``), in their order.

    Patterns are of names here or, by ``own_names``, in the checkpoint; None stands for all layers.
    A pattern that matches nothing is a UserError.
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

    The first worker's ``folder`` keeps partial results, from which ``resume`` continues. Return the
    result, and the scan's seconds, None where an earlier run did part of it. Workers that differ,
    or partial results of another scan, are a UserError.
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
    """Run all images, but variants only on chunks not ``finished``; every worker returns all."""
    cascade = Cascade.of(scan.network, scan.fast)
    variants = _prune_each_layer(scan, cascade, finished)
    pruned = [(amount, layer) for amount in scan.amounts for layer in scan.layers]
    dense_correct, features, correct, recheck = [], [], [], Fp32Recheck()
    chunk_size = scan.batch_size * CHUNK_BATCHES * scan.workers.count
    with cli.progress(None, "scan", total=len(scan.images), unit="image") as bar:
        for first in range(0, len(scan.images), chunk_size):
            chunk = slice(first, min(first + chunk_size, len(scan.images)))
            key = f"images-{chunk.start}-{chunk.stop}"
            dense, values, bits, counts = _run_chunk(
                scan, cascade, [] if key in finished else variants, chunk, bar.update
            )
            dense_correct.append(dense)
            features.append(values)
            if key not in finished:
                packed = np.packbits(bits.numpy()).tobytes().hex()
                finished[key] = {"correct": packed, "recheck": asdict(counts)}
            packed = np.frombuffer(bytes.fromhex(finished[key]["correct"]), dtype=np.uint8)
            shape = (len(pruned), len(dense))
            bits = np.unpackbits(packed, count=math.prod(shape)).reshape(shape)
            correct.append(torch.from_numpy(bits.astype(bool)))
            recheck.add(Fp32Recheck(**finished[key]["recheck"]))
    by_layer = dict(zip(pruned, torch.cat(correct, dim=1), strict=True))
    recheck = recheck if scan.fast else None
    return ScanResult(torch.cat(dense_correct), torch.cat(features), by_layer, recheck)


def _prune_each_layer(
    scan: Scan, cascade: Cascade, finished: MutableMapping[str, dict]
) -> list[Variants]:
    """Return the variants of each amount; bounds for bf16 are the first worker's, or kept ones."""
    variants = {}
    for amount in scan.amounts:
        masks = l1_masks({name: scan.weights[name] for name in scan.layers}, amount)
        fast = masked_layers(cascade.fast_network, masks) if scan.fast else None
        variants[str(amount)] = Variants(masked_layers(cascade.network, masks), fast)
    if not scan.fast:
        return [*variants.values()]
    if "bounds" not in finished:
        bounds = {
            amount: cascade.measure_bounds(scan.images, pruned, scan.batch_size).tolist()
            for amount, pruned in variants.items()
        }
        finished["bounds"] = scan.workers.broadcast(bounds)
    bounds = {amount: torch.tensor(margins) for amount, margins in finished["bounds"].items()}
    return [replace(pruned, bounds=bounds[amount]) for amount, pruned in variants.items()]


def _run_chunk(
    scan: Scan, cascade: Cascade, variants: Sequence[Variants], chunk: slice,
    report: Callable[[int], object],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Fp32Recheck]:  # fmt: skip
    """Run some images, each worker its share; return the results of all on the CPU."""
    workers, features = scan.workers, scan.head.features if scan.head else None
    share = scan.images.rows(workers.share_of(chunk.start, chunk.stop, scan.batch_size))
    batches, counts = [], Fp32Recheck()
    for batch in cascade.walk(features, variants, share, scan.batch_size, counts):
        batches.append(batch)
        report(len(batch[0]) * workers.count)
    whole, recheck = [], Fp32Recheck()
    for found, counted in workers.gather(([[t.cpu() for t in batch] for batch in batches], counts)):
        whole += found
        recheck.add(counted)
    dense_correct, values, correct = zip(*whole, strict=True)
    return torch.cat(dense_correct), torch.cat(values), torch.cat(correct, dim=1), recheck
