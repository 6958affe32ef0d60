"""The steps of quantization.py: from a loaded model to INT8 models that are saved and timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.command import cli
from common.images.cifar10 import CLASSES
from common.images.data import ImageSet, normalize
from common.measure import evaluate
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.resnet import ResNet18
from quantization.accuracy.budget import Plan
from quantization.bench import Bench
from quantization.files import artifact, onnx_export
from quantization.int8 import conversion, deploy
from quantization.int8.deploy import Quantized
from quantization.settings import Settings

FP32, FP32_NCHW, ONNX = "fp32", "fp32-nchw", "int8-onnx"
SANITY_IMAGES = 100
CHANCE_MARGIN = 0.1  # accuracy this close above chance is no training worth the name
OVERCONFIDENCE = 0.25  # a trained network on its own kind of images stays far below this


@dataclass(frozen=True)
class OnnxModel:
    """The INT8 model as ONNX, run by ONNX Runtime.

    Attributes:
        path: Of the file.
        run: Maps normalised images to logits.
        predictions: On the test images (int64, shape (N,)).
        agreement: Fraction of them that the model it was exported from answers alike.
    """

    path: Path
    run: Callable[[torch.Tensor], torch.Tensor]
    predictions: torch.Tensor
    agreement: float


def predict_fp32(model: ResNet18, bench: Bench, device: torch.device) -> torch.Tensor:
    """Return FP32's predictions (int64, shape (N,)), made on ``device``; warns of odd ones."""
    moved = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    images = bench.images.to(device)
    predictions = evaluate.predict(moved, images, bench.batch_size, "evaluate FP32")
    warn_of_insane_fp32(model, bench.images, predictions)
    return predictions


@torch.inference_mode()
def warn_of_insane_fp32(model: ResNet18, test: ImageSet, predictions: torch.Tensor) -> None:
    """Warn where FP32 accuracy is near chance, or far below what the model's confidence claims.

    Args:
        model: FP32, in eval mode, on the CPU.
        test: The images that were evaluated, on the CPU, shuffled.
        predictions: int64, shape (N,).
    """
    accuracy = evaluate.measure_accuracy(predictions == test.labels).value
    logits = model(normalize(test.images[:SANITY_IMAGES]))
    confidence = float(logits.softmax(dim=1).amax(dim=1).mean())
    causes = (
        "likely causes: images normalised otherwise than in training, classes in another order, or "
        "a checkpoint of another data set or layout"
    )
    if accuracy < 1 / len(CLASSES) + CHANCE_MARGIN:
        cli.log.warning("FP32 accuracy is %.1f %%, near chance; %s", 100 * accuracy, causes)
    elif confidence - accuracy > OVERCONFIDENCE:
        cli.log.warning(
            "FP32 accuracy is %.1f %%, though the model is %.0f %% sure of its answers; %s",
            100 * accuracy, 100 * confidence, causes,
        )  # fmt: skip


def quantize(model: ResNet18, bench: Bench, settings: Sequence[Settings]) -> list[Quantized]:
    """Calibrate, convert and evaluate on the CPU; engines that see the same ranges share them."""
    calibrated, quantized = {}, []
    for choice in settings:
        ranges = replace(choice, engine="")
        if ranges not in calibrated:
            calibrated[ranges] = bench.calibrate(model, choice)
        observed = calibrated[ranges]
        converted = conversion.convert(observed, choice)
        deployed = deploy.Deployed(converted, choice.engine)
        predictions = bench.predict(deployed, f"evaluate INT8 {choice.engine}")
        quantized.append(Quantized(choice, observed, converted, deployed, predictions))
    return quantized


def apply_plan(plan: Plan, settings: Settings) -> Settings:
    """Return the plan's settings for the engine of ``settings``."""
    return replace(plan.settings, engine=settings.engine, reduce_range=settings.reduce_range)


def save_models(
    quantized: Sequence[Quantized], file: Callable[[str], Path]
) -> dict[str, list[Path]]:
    """Write every INT8 model.

    Returns:
        By engine the path with the state dict and, where TorchScript is supported, the frozen
        model's.
    """
    paths = {}
    for candidate in quantized:
        engine = candidate.settings.engine
        path = file(artifact.file_name(engine))
        artifact.save_int8(candidate.model, candidate.settings, path)
        paths[engine] = [path]
        if deploy.CAN_FREEZE:
            paths[engine].append(path.with_suffix(artifact.FROZEN_SUFFIX))
            artifact.save_frozen(candidate.model, engine, paths[engine][1])
    return paths


def export_onnx(quantized: Quantized, path: Path, bench: Bench) -> OnnxModel:
    """Write the INT8 model as ONNX and evaluate the file in ONNX Runtime, at equal threads."""
    onnx_export.export_onnx(quantized.model, path)
    run = onnx_export.load_onnx(path)
    predictions = bench.predict(run, "evaluate ONNX")
    agreeing = predictions == quantized.predictions
    return OnnxModel(path, run, predictions, float(agreeing.double().mean()))


def time_models(
    model: ResNet18,
    quantized: Sequence[Quantized],
    onnx: OnnxModel | None,
    test: ImageSet,
    batch_sizes: Sequence[int],
    seconds: float,
) -> dict[str, list[Timing]]:
    """Time FP32 as usually written, FP32 at its best and each INT8 model, interleaved.

    ``seconds`` are spent on each batch size.

    Returns:
        Timings by ``fp32-nchw``, ``fp32``, each engine's name and ``int8-onnx``.
    """
    contenders = [
        Contender(FP32_NCHW, model, torch.contiguous_format),
        Contender(FP32, deploy.deploy_fp32(model)),
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
