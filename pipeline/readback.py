"""Files measured by a process that made none of them: what it reads is all that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.images.data import ImageSet
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, time_interleaved
from common.network.checkpoint import load_model
from common.network.tracing import trace_network
from quantization.files.artifact import load_int8
from quantization.int8.engines import fp32_runner

FP32 = "fp32"


def measure_files(
    fp32: Path,
    int8: Mapping[str, Path],
    images: ImageSet,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, dict]:
    """Read a checkpoint and INT8 files; evaluate each, time all in turns.

    Args:
        fp32: The dense checkpoint; FP32 at its best is what the others are compared with.
        int8: Files by name.
        images: To evaluate and to time on.
        batch_size: Of the evaluation, in images.
        timed: Batch sizes to time.
        seconds: To spend on each of these.

    Returns:
        By name, the checkpoint's under ``FP32``: ``accuracy``, ``comparison`` and ``latency`` as
        results.json has them.

    Raises:
        UserError: A file is not what was written.
    """
    models = {FP32: fp32_runner(trace_network(load_model(fp32), images.shape))}
    models |= {name: load_int8(path) for name, path in int8.items()}
    correct = {
        name: predict(model, images, batch_size, f"read back {name}") == images.labels
        for name, model in models.items()
    }
    contenders = [Contender(name, model) for name, model in models.items()]
    timings = time_interleaved(
        contenders, images.normalize(images.images[: max(timed)]), timed, seconds
    )
    return {
        name: Paired.of(correct[FP32], own).as_dict()
        | {"latency": [timing.as_dict() for timing in timings[name]]}
        for name, own in correct.items()
    }
