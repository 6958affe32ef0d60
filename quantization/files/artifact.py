"""INT8 models from files, the proof that a file alone is enough, and the check for a device.

    from quantization import load_int8
    model = load_int8("resnet18_cifar10_int8.safetensors")
    logits = model(model.normalize(pixels))  # uint8, (N, 3, H, W)
    names = [model.classes[index] for index in logits.argmax(dim=1)]

:mod:`quantization.files.int8_file` describes the file.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.command.cli import UserError, log
from common.files.atomic import replace_file
from common.images.data import ImageSet
from common.machine.fresh_process import start_fresh
from quantization.files.int8_file import read_int8, seal
from quantization.int8 import engines
from quantization.int8.engines.base import Int8Model
from runtime.decode import CHECK_MARK

RELOAD_IMAGES = 64  # their logits are compared bit by bit after reloading
CHECK_IMAGES, CHECK_SUFFIX = 16, ".check"  # what is compared on a device


def load_int8(path: str | Path, engine: str | None = None) -> Int8Model:
    """Load an INT8 network as a module that runs on the CPU, by default on its fastest engine.

    A file that is missing, damaged or of another format, or an engine that is not here, is a
    UserError.
    """
    network = read_int8(Path(path))
    engine = engine or engines.fastest_engine()
    if engines.saturates(engine) and not network.settings.reduce_range:
        log.warning(
            "%s uses 8-bit activations; sums of products saturate on this CPU, where accuracy is "
            "lost: quantize it again here",
            path,
        )
    return engines.runner(engine, network)


@contextlib.contextmanager
def verifying_reloaded(models: Sequence[tuple[Path, Int8Model]], test: ImageSet) -> Iterator[None]:
    """Load saved INT8 models in a fresh process and demand the logits of those in memory.

    This proves that the files alone are enough. They are loaded while the block runs, and compared
    at its end; a model that computes something else is a UserError.
    """
    images = test.normalize(test.images[:RELOAD_IMAGES])
    wanted = [(path, model.engine) for path, model in models]
    with start_fresh(_run_saved, wanted, images.numpy()) as wait:
        yield
        logits = wait()
    for (path, model), rows in zip(models, logits, strict=True):
        expected, reloaded = model(images), torch.from_numpy(rows)
        if not torch.equal(expected, reloaded):
            worst = float((expected - reloaded).abs().max())
            raise UserError(f"{path.name}: reloaded logits differ by up to {worst:.3g}; not kept")
    for path in dict.fromkeys(path for path, _ in models):
        log.info("%s: reloaded in a fresh process, logits bit-equal", path.name)


def _run_saved(wanted: Sequence[tuple[Path, str]], images: np.ndarray) -> list[np.ndarray]:
    """Return the logits (float32, (N, classes)) of saved models on engines."""
    return [load_int8(path, engine)(torch.from_numpy(images)).numpy() for path, engine in wanted]


@torch.inference_mode()
def write_checks(
    models: Iterable[Path], images: ImageSet, file: Callable[[str], Path], engine: str
) -> None:
    """Write for INT8 files what ``decode.py --check`` reads: images and logits by an engine."""
    pixels = images.images[:CHECK_IMAGES].contiguous()
    for path in models:
        model = load_int8(path, engine)
        logits = model(model.normalize(pixels))
        content = seal({"pixels": pixels.numpy(), "logits": logits.numpy()}, CHECK_MARK)
        replace_file(file(f"{path.stem}{CHECK_SUFFIX}"), content)
