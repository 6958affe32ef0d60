"""The steps of quantization.py, from a loaded model to the entries of results.json."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.fx import GraphModule

from common import cli, evaluate
from common.cli import UserError
from common.data import Cifar10, batches, normalize
from common.latency import Contender, Timing, time_interleaved
from common.model import ResNet18, fold_batch_norm
from common.size import saved_size_bytes
from quantization import artifact, budget, engines
from quantization.budget import Plan
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
        predictions: On the test images (int64, shape (N,)).
    """

    settings: Settings
    observed: GraphModule
    model: GraphModule
    predictions: torch.Tensor


def predict_fp32(
    model: ResNet18, test: Cifar10, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Return the FP32 model's predictions (int64, shape (N,)), made on ``device``."""
    moved = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    return evaluate.predict(moved, test.to(device), batch_size, "evaluate FP32")


def quantize(
    model: ResNet18, calibration: Cifar10, test: Cifar10, settings: Settings, batch_size: int
) -> Quantized:
    """Calibrate, convert and evaluate on the CPU."""
    observed = engines.calibrate(model, batches(calibration, batch_size), settings)
    converted = engines.convert(observed, settings)
    description = f"evaluate INT8 {settings.engine}"
    predictions = evaluate.predict(converted, test, batch_size, description)
    return Quantized(settings, observed, converted, predictions)


def plan_within_budget(
    model: ResNet18,
    calibration: Cifar10,
    held_out: Cifar10,
    settings: Settings,
    max_drop: float,
    batch_size: int,
) -> Plan:
    """Find how to quantize so that held-out training images lose at most ``max_drop``."""
    trial = budget.Trial(model, calibration, held_out, batch_size)
    return budget.meet_budget(trial, model, settings, max_drop)


def apply_plan(plan: Plan, settings: Settings) -> Settings:
    """Return the plan's settings for the engine of ``settings``."""
    return replace(plan.settings, engine=settings.engine, reduce_range=settings.reduce_range)


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


def describe_models(
    model: ResNet18,
    predictions: torch.Tensor,
    quantized: Sequence[Quantized],
    paths: Sequence[Path],
    test: Cifar10,
    timings: dict[str, list[Timing]],
) -> list[dict]:
    """Return results.json's ``models``: FP32 in both layouts, then each INT8 model.

    Args:
        model: FP32.
        predictions: FP32's, on ``test``.
        quantized: The INT8 models.
        paths: Where each is saved.
        test: The images.
        timings: From :func:`time_models`.
    """
    dense_correct = predictions == test.labels
    size_bytes = saved_size_bytes(model.state_dict())
    nchw, best = (
        {
            "name": name,
            "engine": None,
            "size_bytes": size_bytes,
            "accuracy": evaluate.measure_accuracy(dense_correct).as_dict(),
            "latency": [timing.as_dict() for timing in timings[name]],
        }
        for name in (FP32_NCHW, FP32)
    )
    entries = [nchw, best]
    for candidate, path in zip(quantized, paths, strict=True):
        correct = candidate.predictions == test.labels
        entry = {
            "name": "int8",
            "engine": candidate.settings.engine,
            "settings": asdict(candidate.settings),
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
            "accuracy": evaluate.measure_accuracy(correct).as_dict(),
            "latency": [timing.as_dict() for timing in timings[candidate.settings.engine]],
            **_coverage(candidate),
        }
        entry["comparison"] = {
            "size_ratio": entry["size_bytes"] / size_bytes,
            "accuracy": evaluate.compare(dense_correct, correct).as_dict(),
            "speedup": _speedups(best, entry),
        }
        entry["speedup_over_nchw"] = _speedups(nchw, entry)
        entries.append(entry)
    return entries


def _coverage(candidate: Quantized) -> dict:
    operations = engines.list_operations(candidate.model)
    return {
        "int8_operations": [op.name for op in operations if op.is_int8],
        "fp32_operations": [
            {"name": op.name, "reason": "kept in FP32 to hold the accuracy budget"}
            for op in operations
            if not op.is_int8
        ],
    }


def _speedups(fp32: dict, int8: dict) -> list[dict]:
    """Return the ratio of median latencies by batch size; above 1 the INT8 entry is faster."""
    return [
        {"batch_size": b["batch_size"], "value": a["median_ms"] / b["median_ms"]}
        for a, b in zip(fp32["latency"], int8["latency"], strict=True)
    ]


def int8_entries(results: dict) -> list[dict]:
    """Return the INT8 models of results.json."""
    return [model for model in results["models"] if model["name"] == "int8"]


def describe_budget(plan: Plan, max_drop: float, results: dict) -> dict:
    """Return results.json's ``budget``: met only if the test images agree with the plan."""
    test_drop = results["comparison"]["accuracy"]["drop"]
    return {
        "max_drop": max_drop,
        "met": plan.drop <= max_drop and test_drop <= max_drop,
        "fp32_layers": list(plan.settings.fp32_layers),
        "held_out_drop": plan.drop,
        "test_drop": test_drop,
        "steps": [asdict(step) for step in plan.steps],
    }
