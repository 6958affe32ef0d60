"""The steps of quantization.py, from a loaded model to the entries of results.json."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import GraphModule

from common import cli, evaluate
from common.cli import UserError
from common.data import Cifar10, batches, normalize
from common.latency import Contender, Timing, time_interleaved
from common.model import ResNet18, fold_batch_norm
from common.size import saved_size_bytes
from quantization import artifact, engines
from quantization.engines import Settings

RELOAD_IMAGES = 64  # their logits are compared bit by bit after reloading
FP32, FP32_NCHW = "fp32", "fp32-nchw"


@dataclass(frozen=True)
class Quantized:
    """An INT8 model with what was measured of it.

    Attributes:
        settings: How it was made.
        observed: The calibrated model that it was converted from.
        model: The INT8 model.
        correct: Per-image correctness on the test images (bool, shape (N,)).
    """

    settings: Settings
    observed: GraphModule
    model: GraphModule
    correct: torch.Tensor


def measure_fp32(
    model: ResNet18, test: Cifar10, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Return the FP32 model's per-image correctness (bool, shape (N,)), measured on ``device``."""
    moved = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    predictions = evaluate.predict(moved, test.to(device), batch_size, "evaluate FP32")
    return predictions == test.labels


def quantize(
    model: ResNet18, calibration: Cifar10, test: Cifar10, settings: Settings, batch_size: int
) -> Quantized:
    """Calibrate, convert and evaluate on the CPU."""
    observed = engines.calibrate(model, batches(calibration, batch_size), settings)
    converted = engines.convert(observed, settings)
    description = f"evaluate INT8 {settings.engine}"
    predictions = evaluate.predict(converted, test, batch_size, description)
    return Quantized(settings, observed, converted, predictions == test.labels)


def save_and_verify(quantized: Quantized, path: Path, test: Cifar10) -> None:
    """Write the INT8 model, load it in a fresh process, and demand bit-equal logits.

    Raises:
        UserError: The reloaded model computes something else.
    """
    artifact.save_int8(quantized.model, quantized.settings, path)
    images = normalize(test.images[:RELOAD_IMAGES])
    with torch.inference_mode():
        expected = quantized.model(images)
    reloaded = artifact.logits_in_fresh_process(path, images, torch.get_num_threads())
    if not torch.equal(expected, reloaded):
        worst = float((expected - reloaded).abs().max())
        raise UserError(f"{path.name}: reloaded logits differ by up to {worst:.3g}; not kept")
    cli.log.info("%s: reloaded in a fresh process, logits bit-equal", path.name)


def time_models(
    model: ResNet18,
    quantized: Sequence[Quantized],
    test: Cifar10,
    batch_sizes: Sequence[int],
    seconds: float,
) -> dict[str, list[Timing]]:
    """Time FP32 as usually written, FP32 at its best and each INT8 model, interleaved.

    Args:
        model: FP32.
        quantized: The INT8 models.
        test: Images to feed.
        batch_sizes: In images.
        seconds: To spend on each batch size.

    Returns:
        Timings by ``fp32-nchw``, ``fp32`` and each engine's name.
    """
    best = fold_batch_norm(model).to(memory_format=torch.channels_last)
    contenders = [
        Contender(FP32_NCHW, model, torch.contiguous_format),
        Contender(FP32, best),
        *(Contender(candidate.settings.engine, candidate.model) for candidate in quantized),
    ]
    images = normalize(test.images[: max(batch_sizes)])
    return time_interleaved(contenders, images, batch_sizes, seconds)


def fp32_entry(
    name: str, model: ResNet18, correct: torch.Tensor, timings: Sequence[Timing]
) -> dict:
    """Return an FP32 entry of results.json's ``models``."""
    return {
        "name": name,
        "engine": None,
        "size_bytes": saved_size_bytes(model.state_dict()),
        "accuracy": evaluate.measure_accuracy(correct).as_dict(),
        "latency": [timing.as_dict() for timing in timings],
    }


def int8_entry(quantized: Quantized, path: Path, timings: Sequence[Timing]) -> dict:
    """Return an INT8 entry of results.json's ``models``; ``path`` is of the saved model."""
    operations = engines.list_operations(quantized.model)
    return {
        "name": "int8",
        "engine": quantized.settings.engine,
        "reduce_range": quantized.settings.reduce_range,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "accuracy": evaluate.measure_accuracy(quantized.correct).as_dict(),
        "latency": [timing.as_dict() for timing in timings],
        "int8_operations": [operation.name for operation in operations],
    }


def compare_models(fp32: dict, int8: dict, accuracy: evaluate.Comparison) -> dict:
    """Return results.json's ``comparison`` of an INT8 entry with an FP32 one."""
    return {
        "size_ratio": int8["size_bytes"] / fp32["size_bytes"],
        "accuracy": accuracy.as_dict(),
        "speedup": speedups(fp32, int8),
    }


def speedups(fp32: dict, int8: dict) -> list[dict]:
    """Return the ratio of median latencies by batch size; above 1 the INT8 entry is faster."""
    return [
        {"batch_size": b["batch_size"], "value": a["median_ms"] / b["median_ms"]}
        for a, b in zip(fp32["latency"], int8["latency"], strict=True)
    ]
