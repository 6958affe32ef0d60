"""Files measured by a process that made none of them: what it reads is all that it knows."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.images.data import ImageSet
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, time_interleaved
from common.network.execution import Network
from quantization.files.artifact import load_int8
from quantization.int8.engines import fp32_runner

FP32 = "fp32"


def measure_files(
    fp32: Network,
    int8: dict[str, Path],
    only_timed: dict[str, Path],
    images: ImageSet,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, dict]:
    """Read INT8 files; evaluate one after the other, then time all in turns.

    ``fp32`` is the dense network, which the others are compared with. ``batch_size`` is that of
    the evaluation; each batch size in ``timed`` is timed for some ``seconds``.

    Returns:
        ``accuracy``, ``comparison`` and ``latency`` of results.json by name, the dense network's
        under ``FP32``; only ``latency`` where a file is only timed.

    Raises:
        UserError: A file is not what was written.
    """
    readers = {FP32: partial(fp32_runner, fp32)}
    readers |= {name: partial(load_int8, path) for name, path in (int8 | only_timed).items()}
    correct = {  # a network at a time: none is held while another is evaluated
        name: predict(readers[name](), images, batch_size, f"read back {name}") == images.labels
        for name in (FP32, *int8)
    }
    contenders = [Contender(name, read()) for name, read in readers.items()]
    pixels = images.normalize(images.images[: max(timed)])
    timings = time_interleaved(contenders, pixels, timed, seconds)
    measured = {
        name: {"latency": [timing.as_dict() for timing in own]} for name, own in timings.items()
    }
    for name, own in correct.items():
        measured[name] |= Paired.of(correct[FP32], own).as_dict()
    return measured
