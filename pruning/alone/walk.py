"""The scan at work: one walk over the images, in chunks that an interrupted run keeps.

Each batch runs through the dense network once, and every pruned variant branches off it
(:mod:`common.network.branching`), in bf16 where that is fast, with FP32's predictions
(:mod:`common.network.cascade`).
"""

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch

from common.command import cli
from common.files.output import OutputFolder
from common.images.data import checksum
from common.network.cascade import Cascade, Fp32Recheck, Variants
from pruning.alone.scan import Scan, ScanResult
from pruning.masks import l1_masks, masked_layers

# Unit of partial results: all layers at all amounts, on this many batches of images.
CHUNK_BATCHES = 16


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
    variants, achieved = _prune_each_layer(scan, cascade)
    if scan.fast:
        variants = _with_bounds(scan, cascade, variants, finished)
    dense_correct, features, correct, recheck = [], [], [], Fp32Recheck()
    chunk_size = scan.batch_size * CHUNK_BATCHES * scan.workers.count
    with cli.progress(None, "scan", total=len(scan.images), unit="image") as bar:
        for first in range(0, len(scan.images), chunk_size):
            chunk = slice(first, min(first + chunk_size, len(scan.images)))
            key = f"images-{chunk.start}-{chunk.stop}"
            dense, values, bits, counts = _run_chunk(
                scan, cascade, [] if key in finished else [*variants.values()], chunk, bar.update
            )
            dense_correct.append(dense)
            features.append(values)
            if key not in finished:
                packed = np.packbits(bits.numpy()).tobytes().hex()
                finished[key] = {"correct": packed, "recheck": asdict(counts)}
            packed = np.frombuffer(bytes.fromhex(finished[key]["correct"]), dtype=np.uint8)
            shape = (len(achieved), len(dense))
            bits = np.unpackbits(packed, count=math.prod(shape)).reshape(shape)
            correct.append(torch.from_numpy(bits.astype(bool)))
            recheck.add(Fp32Recheck(**finished[key]["recheck"]))
    by_layer = dict(zip(achieved, torch.cat(correct, dim=1), strict=True))
    return ScanResult(
        torch.cat(dense_correct), torch.cat(features), by_layer, achieved,
        recheck if scan.fast else None,
    )  # fmt: skip


def _prune_each_layer(
    scan: Scan, cascade: Cascade
) -> tuple[dict[float, Variants], dict[tuple[float, str], float]]:
    """Return the variants of each amount, and for each amount and layer the fraction of zeros."""
    variants, achieved = {}, {}
    for amount in scan.amounts:
        masks = l1_masks({name: scan.weights[name] for name in scan.layers}, amount)
        for name, kept in masks.items():
            zeros = int((scan.weights[name].masked_fill(~kept, 0) == 0).sum())
            achieved[amount, name] = zeros / kept.numel()
        fast = masked_layers(cascade.fast_network, masks) if scan.fast else None
        variants[amount] = Variants(masked_layers(cascade.network, masks), fast)
    return variants, achieved


def _with_bounds(
    scan: Scan, cascade: Cascade, variants: Mapping[float, Variants],
    finished: MutableMapping[str, dict],
) -> dict[float, Variants]:  # fmt: skip
    """Give each amount's variants bounds for bf16: the first worker's, or those kept before."""
    if "bounds" not in finished:
        bounds = {
            str(amount): cascade.measure_bounds(scan.images, of_amount, scan.batch_size).tolist()
            for amount, of_amount in variants.items()
        }
        finished["bounds"] = scan.workers.broadcast(bounds)
    bounds = {float(amount): torch.tensor(x) for amount, x in finished["bounds"].items()}
    return {a: replace(of_amount, bounds=bounds[a]) for a, of_amount in variants.items()}


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
