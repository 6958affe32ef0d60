"""The steps of quantization.py: from a loaded model to INT8 models that are saved and timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from common import cli, evaluate
from common.cli import UserError
from common.data import Cifar10, batches, normalize
from common.latency import Contender, Timing, time_interleaved
from common.model import ResNet18, fold_batch_norm
from common.workers import ALONE, Workers
from quantization import artifact, budget, conversion, deploy, onnx_export
from quantization.budget import Plan
from quantization.settings import Settings

RELOAD_IMAGES = 64  # their logits are compared bit by bit after reloading
FP32, FP32_NCHW, ONNX = "fp32", "fp32-nchw", "int8-onnx"


@dataclass(frozen=True)
class Quantized:
    """An INT8 model with what was measured of it.

    Attributes:
        settings: How it was made.
        observed: The calibrated model that it was converted from.
        model: The INT8 model.
        deployed: The same in its fastest form, which is what is evaluated and timed.
        predictions: On the test images (int64, shape (N,)).
    """

    settings: Settings
    observed: GraphModule
    model: GraphModule
    deployed: nn.Module
    predictions: torch.Tensor


@dataclass(frozen=True)
class OnnxModel:
    """The INT8 model as ONNX, run by ONNX Runtime.

    Attributes:
        path: Of the file.
        run: Maps normalised images to logits.
        predictions: On the test images (int64, shape (N,)).
    """

    path: Path
    run: Callable[[torch.Tensor], torch.Tensor]
    predictions: torch.Tensor


def predict_fp32(model: ResNet18, test: Cifar10, batch_size: int, workers: Workers) -> torch.Tensor:
    """Return the FP32 model's predictions (int64, shape (N,)), made on the workers' devices."""
    moved = copy.deepcopy(model).to(workers.device, memory_format=torch.channels_last)
    return evaluate.predict(moved, test.to(workers.device), batch_size, "evaluate FP32", workers)


def quantize(
    model: ResNet18,
    calibration: Cifar10,
    test: Cifar10,
    settings: Sequence[Settings],
    batch_size: int,
    workers: Workers = ALONE,
) -> list[Quantized]:
    """Calibrate, convert and evaluate on the CPU; engines that see the same ranges share them.

    Each of the ``workers`` calibrates for itself, alike, and evaluates its share of the images.
    """
    calibrated, quantized = {}, []
    for choice in settings:
        ranges = replace(choice, engine="")
        if ranges not in calibrated:
            loader = batches(calibration, batch_size)
            calibrated[ranges] = conversion.calibrate(model, loader, choice)
        observed = calibrated[ranges]
        converted = conversion.convert(observed, choice)
        deployed = deploy.deploy(converted, choice.engine)
        description = f"evaluate INT8 {choice.engine}"
        predictions = evaluate.predict(deployed, test, batch_size, description, workers)
        quantized.append(Quantized(choice, observed, converted, deployed, predictions))
    return quantized


def plan_within_budget(
    model: ResNet18,
    calibration: Cifar10,
    held_out: Cifar10,
    settings: Settings,
    max_drop: float,
    batch_size: int,
    workers: Workers = ALONE,
) -> Plan:
    """Find how to quantize so that held-out training images lose at most ``max_drop``."""
    trial = budget.Trial(model, calibration, held_out, batch_size, workers)
    return budget.meet_budget(trial, model, settings, max_drop)


def apply_plan(plan: Plan, settings: Settings) -> Settings:
    """Return the plan's settings for the engine of ``settings``."""
    return replace(plan.settings, engine=settings.engine, reduce_range=settings.reduce_range)


def save_and_verify(quantized: Quantized, path: Path, test: Cifar10) -> list[Path]:
    """Write the INT8 model, load it in a fresh process, and demand bit-equal logits.

    Returns:
        ``path`` with the state dict and, where TorchScript is supported, the frozen model's path.

    Raises:
        UserError: A reloaded model computes something else.
    """
    artifact.save_int8(quantized.model, quantized.settings, path)
    paths = [path]
    if deploy.CAN_FREEZE:
        paths.append(path.with_suffix(artifact.FROZEN_SUFFIX))
        artifact.save_frozen(quantized.model, quantized.settings.engine, paths[-1])
    for saved in paths:
        verify_reloaded(saved, quantized.deployed, test)
    return paths


def verify_reloaded(path: Path, deployed: nn.Module, test: Cifar10) -> None:
    """Load a saved INT8 model in a fresh process and demand the logits of the one in memory.

    Args:
        path: Of the file, in any form that can be loaded.
        deployed: The model that was saved, as it is run.
        test: Some of these images are run through both.

    Raises:
        UserError: The reloaded model computes something else.
    """
    images = normalize(test.images[:RELOAD_IMAGES])
    with torch.inference_mode():
        expected = deployed(images)
    reloaded = artifact.logits_in_fresh_process(path, images, torch.get_num_threads())
    if not torch.equal(expected, reloaded):
        worst = float((expected - reloaded).abs().max())
        raise UserError(f"{path.name}: reloaded logits differ by up to {worst:.3g}; not kept")
    cli.log.info("%s: reloaded in a fresh process, logits bit-equal", path.name)


def export_onnx(quantized: Quantized, path: Path, test: Cifar10, batch_size: int) -> OnnxModel:
    """Write the INT8 model as ONNX and evaluate the file in ONNX Runtime, at equal threads."""
    onnx_export.export_onnx(quantized.model, path)
    run = onnx_export.OnnxRuntimeModel(path, torch.get_num_threads())
    return OnnxModel(path, run, evaluate.predict(run, test, batch_size, "evaluate ONNX"))


def time_models(
    model: ResNet18,
    quantized: Sequence[Quantized],
    onnx: OnnxModel | None,
    test: Cifar10,
    batch_sizes: Sequence[int],
    seconds: float,
) -> dict[str, list[Timing]]:
    """Time FP32 as usually written, FP32 at its best and each INT8 model, interleaved.

    FP32 at its best is treated as INT8 is: batch-norm folded, channels_last, frozen.

    Args:
        model: FP32.
        quantized: The INT8 models.
        onnx: The exported one, if any.
        test: Images to feed.
        batch_sizes: In images.
        seconds: To spend on each batch size.

    Returns:
        Timings by ``fp32-nchw``, ``fp32``, each engine's name and ``int8-onnx``.
    """
    best = deploy.freeze(fold_batch_norm(model).to(memory_format=torch.channels_last))
    contenders = [
        Contender(FP32_NCHW, model, torch.contiguous_format),
        Contender(FP32, best),
        *(Contender(candidate.settings.engine, candidate.deployed) for candidate in quantized),
    ]
    if onnx is not None:
        contenders.append(Contender(ONNX, onnx.run, torch.contiguous_format))
    images = normalize(test.images[: max(batch_sizes)])
    return time_interleaved(contenders, images, batch_sizes, seconds)


def fastest_first(
    quantized: Sequence[Quantized], timings: dict[str, list[Timing]]
) -> list[Quantized]:
    """Sort INT8 models by the geometric mean of their speeds over the batch sizes."""

    def log_time(candidate: Quantized) -> float:
        return sum(math.log(timing.median_ms) for timing in timings[candidate.settings.engine])

    return sorted(quantized, key=log_time)
