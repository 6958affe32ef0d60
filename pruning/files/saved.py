"""The pruned model's file: written, read back, and measured; how fast a slim network is.

It is a plain checkpoint with the original names. Its zeros still take four bytes each; their worth
shows once the file is compressed.
"""

import copy
import tempfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from common.command.cli import UserError
from common.files.atomic import replace_file
from common.files.untrusted import read_untrusted, serialize
from common.images.data import ImageSet
from common.measure.evaluate import Paired
from common.measure.latency import Contender, time_interleaved
from common.network.size import saved_size_bytes
from common.network.tracing import trace_network
from quantization.files.int8_file import save_int8
from quantization.int8 import engines
from quantization.steps import CalibrationSetup, quantize

# Endings of file names. With a search over many layers, its model has the first; the model of the
# search over the linear layers then has the third.
PRUNED_ENDING, SLIM_ENDING = "_pruned.pth", "_slim.pth"
LINEAR_ENDING = "_pruned_linear.pth"
# At most this many predictions of the reloaded model may differ from the search's.
MAX_FLIPS = 1e-3
TIMED_BATCH_SIZE = 16  # of networks with zeros
TIMED_AMOUNT = 0.9
TIMED_BATCH_SIZES, SECONDS_PER_BATCH_SIZE = (1, 32, 128), 8.0  # of slim networks
BATCH_SIZE = 128


def save_pruned(
    dense: nn.Module, pruned: nn.Module, path: Path
) -> tuple[nn.Module, dict[str, int]]:
    """Write the pruned model and read it back: the same tensors, bit for bit.

    Return the model that was read, on the CPU, and sizes in bytes, plain and compressed by zlib.
    """
    plain, content = (
        serialize({name: t.cpu().contiguous() for name, t in model.state_dict().items()})
        for model in (dense, pruned)
    )
    replace_file(path, lambda file: file.write(content))
    state, read = pruned.state_dict(), read_untrusted(path)
    if any(not torch.equal(tensor.cpu(), read[name]) for name, tensor in state.items()):
        raise AssertionError(f"{path.name} gives back other tensors than were saved")
    reloaded = copy.deepcopy(pruned).cpu()
    reloaded.load_state_dict(read)
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter while it works
        # Level 1, as random mantissas gain nothing from more.
        small = list(pool.map(lambda data: len(zlib.compress(data, 1)), (plain, content)))
    return reloaded, {
        "dense_bytes": len(plain),
        "dense_compressed_bytes": small[0],
        "pruned_bytes": path.stat().st_size,
        "pruned_compressed_bytes": small[1],
    }


def confirm(dense_correct: torch.Tensor, expected: torch.Tensor, correct: torch.Tensor) -> dict:
    """Compare the reloaded model's correct images with those that the search ``expected``.

    Return its part of results.json; if more than 1 image in 1,000 differs, raise a UserError.
    """
    unlike = int((correct != expected).sum())
    if unlike > max(1, MAX_FLIPS * len(correct)):
        raise UserError(f"the reloaded model differs from the search on {unlike} images")
    return Paired.of(dense_correct, correct).as_dict() | {"images_unlike_search": unlike}


def time_zeros(models: Mapping[str, nn.Module], images: ImageSet) -> list[dict]:
    """Time models in turns on the CPU, on some of the images; return entries of results.json."""
    contenders = []
    for name, model in models.items():
        laid_out = copy.deepcopy(model).cpu().to(memory_format=torch.channels_last)
        contenders.append(Contender(name, torch.inference_mode()(laid_out)))
    batch = images.normalize(images.images[:TIMED_BATCH_SIZE].cpu())
    timings = time_interleaved(contenders, batch, (TIMED_BATCH_SIZE,), seconds_per_batch_size=1.5)
    return [{"name": name} | timing.as_dict() for name, (timing,) in timings.items()]


def measure_models(
    dense: nn.Module, slim: nn.Module, calibration: ImageSet, images: ImageSet
) -> list[dict]:
    """Quantize both networks, and evaluate and time all four, on the CPU with the best engine.

    Return results.json's entries ``dense fp32``, ``dense int8``, ``slim fp32`` and ``slim int8``.
    """
    calibration, images = (dataset.to(torch.device("cpu")) for dataset in (calibration, images))
    settings = engines.choose_settings(engines.fastest_engine())
    setup = CalibrationSetup(calibration, images, BATCH_SIZE)
    contenders, entries, dense_correct = [], [], None
    for name, model in (("dense", dense), ("slim", slim)):
        model = copy.deepcopy(model).cpu()
        network = trace_network(model, images.shape)
        best = engines.fp32_runner(network)
        fp32 = setup.predict(best, f"evaluate {name}")
        (int8,) = quantize(network, setup, [settings])
        with tempfile.TemporaryDirectory() as folder:
            int8_bytes = save_int8(int8.model.network, Path(folder, "model.safetensors"))
        for precision, run, predictions, engine, size_bytes in (
            ("fp32", best, fp32, None, saved_size_bytes(model.state_dict())),
            ("int8", int8.model, int8.predictions, settings.engine, int8_bytes),
        ):
            correct = predictions == images.labels
            dense_correct = correct if dense_correct is None else dense_correct
            contenders.append(Contender(f"{name} {precision}", run))
            facts = {"engine": engine, "macs": sum(network.macs.values()), "size_bytes": size_bytes}
            paired = Paired.of(dense_correct, correct).as_dict()
            entries.append({"name": contenders[-1].name, **facts, **paired})
    pixels = images.normalize(images.images[: max(TIMED_BATCH_SIZES)])
    timings = time_interleaved(contenders, pixels, TIMED_BATCH_SIZES, SECONDS_PER_BATCH_SIZE)
    for entry in entries:
        entry["latency"] = [timing.as_dict() for timing in timings[entry["name"]]]
    return entries
