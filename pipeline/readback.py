"""Files measured by a process that made none of them: what it reads is all that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.images.data import Cifar10, normalize
from common.machine.fresh_process import call_fresh
from common.measure.evaluate import predict
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.checkpoint import load_model
from common.network.resnet import fold_batch_norm

FP32 = "fp32"


@dataclass(frozen=True)
class Measured:
    """What a file holds, as found by reading it.

    Attributes:
        predictions: On the images that confirm: int64, shape (N,).
        timings: One a batch size.
    """

    predictions: torch.Tensor
    timings: Sequence[Timing]


def measure_files(
    fp32: Path,
    int8: Mapping[str, Path],
    images: Cifar10,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, Measured]:
    """Read a checkpoint and INT8 files in a fresh process; evaluate each, time all in turns.

    Args:
        fp32: The dense checkpoint; FP32 at its best is what the others are timed beside.
        int8: Files by name.
        images: To evaluate and to time on.
        batch_size: Of the evaluation, in images.
        timed: Batch sizes to time.
        seconds: To spend on each of these.

    Returns:
        By name, the checkpoint's under ``FP32``.

    Raises:
        UserError: A file is not what was written.
    """
    pixels, labels = images.images.numpy(), images.labels.numpy()
    return call_fresh(_measure, fp32, dict(int8), pixels, labels, batch_size, timed, seconds)


def _measure(
    fp32: Path,
    int8: Mapping[str, Path],
    pixels: object,
    labels: object,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, Measured]:
    from quantization.files.artifact import load_int8
    from quantization.int8 import deploy

    images = Cifar10(torch.from_numpy(pixels), torch.from_numpy(labels))
    folded = fold_batch_norm(load_model(fp32)).to(memory_format=torch.channels_last)
    models = {FP32: deploy.freeze(folded)} | {name: load_int8(path) for name, path in int8.items()}
    predictions = {
        name: predict(model, images, batch_size, f"read back {name}")
        for name, model in models.items()
    }
    contenders = [Contender(name, model) for name, model in models.items()]
    timings = time_interleaved(contenders, normalize(images.images[: max(timed)]), timed, seconds)
    return {name: Measured(predictions[name], timings[name]) for name in models}
