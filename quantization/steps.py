"""The steps of quantization.py: from a loaded network to INT8 models that are saved and timed."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from common.command import cli
from common.images.data import ImageSet
from common.measure import evaluate
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.execution import Network
from common.network.tracing import trace_network
from quantization.files.int8_file import SUFFIX, save_int8
from quantization.int8 import conversion, engines
from quantization.int8.conversion import Observation
from quantization.int8.engines import onnx_engines
from quantization.int8.engines.base import Int8Model
from quantization.int8.network import Int8Network
from quantization.settings import Settings

FP32, FP32_NCHW, ONNX = "fp32", "fp32-nchw", "int8-onnx"
SANITY_IMAGES = 100
CHANCE_MARGIN = 0.1  # accuracy this close above chance is no training worth the name
OVERCONFIDENCE = 0.25  # a trained network on its own kind of images stays far below this


@dataclass(frozen=True)
class CalibrationSetup:
    """Images to calibrate on and images to measure on; none is among both."""

    calibration: ImageSet  # training images
    images: ImageSet  # test images, or training images where something is chosen by them
    batch_size: int  # number of images in a batch

    def observe(self, network: Network, settings: Settings) -> Observation:
        """Observe a network's values on the calibration images."""
        return conversion.observe(network, self.calibration, settings.observer, self.batch_size)

    def predict(
        self, model: Callable[[torch.Tensor], torch.Tensor], description: str
    ) -> torch.Tensor:
        """Return a model's predictions (int64, shape (N,)), made on the CPU."""
        return evaluate.predict(model, self.images, self.batch_size, description)


@dataclass(frozen=True)
class Quantized:
    """An INT8 model and what was measured of it."""

    observation: Observation  # the FP32 network that it was made from, observed
    model: Int8Model  # INT8 network on its engine; models on other engines may share the network
    predictions: torch.Tensor  # predictions on the test images (int64, shape (N,))
    settings: Settings  # how it was made


@dataclass(frozen=True)
class OnnxModel:
    """The INT8 model as ONNX, run by ONNX Runtime."""

    path: Path  # path of the file
    run: Callable[[torch.Tensor], torch.Tensor]  # maps normalised images to logits
    predictions: torch.Tensor  # predictions on the test images (int64, shape (N,))
    agreement: float  # fraction of them that the model it was exported from answers alike


def predict_fp32(model: nn.Module, setup: CalibrationSetup, device: torch.device) -> torch.Tensor:
    """Return FP32's predictions (int64, shape (N,)), made on ``device``; warns of odd ones."""
    images = setup.images.to(device)
    if device.type == "cpu":
        fp32 = engines.fp32_runner(trace_network(model, images.shape))
    else:
        fp32 = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    predictions = evaluate.predict(fp32, images, setup.batch_size, "evaluate FP32")
    warn_of_odd_accuracy(model, setup.images, predictions)
    return predictions


@torch.inference_mode()
def warn_of_odd_accuracy(model: nn.Module, test: ImageSet, predictions: torch.Tensor) -> None:
    """Warn if FP32 accuracy is near chance, or far below what the model's confidence claims."""
    accuracy = evaluate.measure_accuracy(predictions == test.labels).value
    logits = model(test.normalize(test.images[:SANITY_IMAGES]))
    confidence = float(logits.softmax(dim=1).amax(dim=1).mean())
    causes = (
        "likely causes: images normalised otherwise than in training or of another size, classes "
        "in another order, or a checkpoint of another data set or layout"
    )
    if accuracy < 1 / len(test.classes) + CHANCE_MARGIN:
        cli.log.warning("FP32 accuracy is %.1f %%, near chance; %s", 100 * accuracy, causes)
    elif confidence - accuracy > OVERCONFIDENCE:
        cli.log.warning(
            "FP32 accuracy is %.1f %%, though the model is %.0f %% sure of its answers; %s",
            100 * accuracy, 100 * confidence, causes,
        )  # fmt: skip


def quantize(
    network: Network, setup: CalibrationSetup, settings: Sequence[Settings]
) -> list[Quantized]:
    """Observe, convert and evaluate on the CPU; what has the same settings is made once."""
    observations: dict[str, Observation] = {}
    networks: dict[Settings, Int8Network] = {}
    quantized = []
    for choice in settings:
        if choice.observer not in observations:
            observations[choice.observer] = setup.observe(network, choice)
        observation, shared = observations[choice.observer], replace(choice, engine="")
        if shared not in networks:
            networks[shared] = conversion.convert(observation, choice)
        model = engines.runner(choice.engine, networks[shared])
        predictions = setup.predict(model, f"evaluate INT8 {choice.engine}")
        quantized.append(Quantized(observation, model, predictions, choice))
    return quantized


def save_models(
    quantized: Sequence[Quantized], file: Callable[[str], Path], stem: str
) -> dict[str, Path]:
    """Write every INT8 network once; return the path of each engine's.

    There are several where engines differ in the bits of activations; the first has the plain name.
    """
    paths: dict[int, Path] = {}
    for candidate in quantized:
        network = candidate.model.network
        if id(network) not in paths:
            ending = f"_{7 if network.settings.reduce_range else 8}bit" if paths else ""
            paths[id(network)] = file(f"{stem}_int8{ending}{SUFFIX}")
            save_int8(network, paths[id(network)])
    return {c.settings.engine: paths[id(c.model.network)] for c in quantized}


def export_onnx(
    network: Int8Network, expected: torch.Tensor, path: Path, setup: CalibrationSetup
) -> OnnxModel:
    """Write an INT8 network as ONNX and run the file; an engine ``expected`` these predictions."""
    onnx_engines.export_onnx(network, path)
    run = onnx_engines.load_onnx(path)
    predictions = setup.predict(run, "evaluate ONNX")
    agreement = float((predictions == expected).double().mean())
    return OnnxModel(path, run, predictions, agreement)


def time_models(
    model: nn.Module, network: Network, quantized: Sequence[Quantized], onnx: OnnxModel | None,
    test: ImageSet, batch_sizes: Sequence[int], seconds: float,
) -> dict[str, list[Timing]]:  # fmt: skip
    """Time in turns FP32 as usually written, ``model``, and at its best, ``network``, and INT8.

    Return timings by ``fp32-nchw``, ``fp32``, each engine's name and ``int8-onnx``.
    """
    contenders = [
        Contender(FP32_NCHW, model, torch.contiguous_format),
        Contender(FP32, engines.fp32_runner(network)),
        *(Contender(candidate.settings.engine, candidate.model) for candidate in quantized),
    ]
    if onnx is not None:
        contenders.append(Contender(ONNX, onnx.run, torch.contiguous_format))
    images = test.normalize(test.images[: max(batch_sizes)])
    return time_interleaved(contenders, images, batch_sizes, seconds)


def fastest_first(
    quantized: Sequence[Quantized], timings: dict[str, list[Timing]]
) -> list[Quantized]:
    """Sort INT8 models by the geometric mean of their speeds over the batch sizes."""
    products_ms = {name: math.prod(t.median_ms for t in timed) for name, timed in timings.items()}
    return sorted(quantized, key=lambda candidate: products_ms[candidate.settings.engine])
