"""Files measured by a process that made none of them: what it reads is all that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.images.data import Cifar10, normalize
from common.measure.evaluate import Paired, compare, measure_accuracy, predict
from common.measure.latency import Contender, Timing, time_interleaved
from common.network.checkpoint import load_model
from quantization.files.artifact import load_int8
from quantization.int8 import deploy

FP32 = "fp32"


@dataclass(frozen=True)
class Measured(Paired):
    """What a file holds, as found by reading it.

    Attributes:
        timings: One a batch size.
    """

    timings: Sequence[Timing]

    def as_dict(self) -> dict:
        """Return the ``accuracy``, ``comparison`` and ``latency`` of results.json."""
        return super().as_dict() | {"latency": [timing.as_dict() for timing in self.timings]}


def measure_files(
    fp32: Path,
    int8: Mapping[str, Path],
    images: Cifar10,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, Measured]:
    """Read a checkpoint and INT8 files; evaluate each, time all in turns.

    Args:
        fp32: The dense checkpoint; FP32 at its best is what the others are compared with.
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
    models = {FP32: deploy.deploy_fp32(load_model(fp32))}
    models |= {name: load_int8(path) for name, path in int8.items()}
    correct = {
        name: predict(model, images, batch_size, f"read back {name}") == images.labels
        for name, model in models.items()
    }
    contenders = [Contender(name, model) for name, model in models.items()]
    timings = time_interleaved(contenders, normalize(images.images[: max(timed)]), timed, seconds)
    return {
        name: Measured(measure_accuracy(own), compare(correct[FP32], own), timings[name])
        for name, own in correct.items()
    }
