"""How fast a slim network is: FP32 and INT8, dense and slim, timed in turns on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.images.data import Cifar10, normalize
from common.measure.evaluate import Comparison, compare, measure_accuracy, predict
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.resnet import ResNet18, fold_batch_norm
from common.network.size import describe_layers, saved_size_bytes
from quantization.bench import Bench
from quantization.int8 import deploy, engines
from quantization.steps import quantize

TIMED_BATCH_SIZES = (1, 32, 128)
SECONDS_PER_BATCH_SIZE = 8.0
BATCH_SIZE = 128


@dataclass(frozen=True)
class Measured:
    """One of the models, on images that did not choose it.

    Attributes:
        name: ``dense fp32``, ``dense int8``, ``slim fp32`` or ``slim int8``.
        engine: Of INT8; None for FP32.
        macs: Multiply-adds an image.
        size_bytes: Of its state dict as a file.
        comparison: With dense FP32.
        correct: bool, shape (N,).
        timings: One a batch size.
    """

    name: str
    engine: str | None
    macs: int
    size_bytes: int
    comparison: Comparison
    correct: torch.Tensor
    timings: Sequence[Timing]

    def as_dict(self) -> dict:
        """Return the entry of results.json."""
        return {
            "name": self.name,
            "engine": self.engine,
            "macs": self.macs,
            "size_bytes": self.size_bytes,
            "accuracy": measure_accuracy(self.correct).as_dict(),
            "comparison": self.comparison.as_dict(),
            "latency": [timing.as_dict() for timing in self.timings],
        }


def measure_models(
    dense: ResNet18, slim: ResNet18, calibration: Cifar10, images: Cifar10
) -> list[Measured]:
    """Quantize both networks, and evaluate and time all four, on the CPU with the best engine.

    Args:
        dense: In eval mode, on any device; not changed.
        slim: The same.
        calibration: Training images; labels are not used.
        images: To evaluate on.
    """
    calibration, images = (dataset.to(torch.device("cpu")) for dataset in (calibration, images))
    settings = engines.choose_settings(engines.candidate_engines()[-1])
    contenders, correct, models = [], {}, {}
    for name, model in (("dense", dense), ("slim", slim)):
        model = copy.deepcopy(model).cpu()
        best = deploy.freeze(fold_batch_norm(model).to(memory_format=torch.channels_last))
        (int8,) = quantize(model, Bench(calibration, images, BATCH_SIZE), [settings])
        contenders += [
            Contender(f"{name} fp32", best), Contender(f"{name} int8", int8.deployed),
        ]  # fmt: skip
        fp32 = predict(best, images, BATCH_SIZE, f"evaluate {name}")
        correct[f"{name} fp32"] = fp32 == images.labels
        correct[f"{name} int8"] = int8.predictions == images.labels
        models |= {f"{name} fp32": model, f"{name} int8": int8.model}
    timings = time_interleaved(
        contenders, normalize(images.images[: max(TIMED_BATCH_SIZES)]), TIMED_BATCH_SIZES,
        SECONDS_PER_BATCH_SIZE,
    )  # fmt: skip
    macs = {
        name: sum(layer.macs for layer in describe_layers(models[f"{name} fp32"]))
        for name in ("dense", "slim")
    }
    return [
        Measured(
            contender.name,
            settings.engine if contender.name.endswith("int8") else None,
            macs[contender.name.split()[0]],
            saved_size_bytes(models[contender.name].state_dict()),
            compare(correct["dense fp32"], correct[contender.name]),
            correct[contender.name],
            timings[contender.name],
        )
        for contender in contenders
    ]
