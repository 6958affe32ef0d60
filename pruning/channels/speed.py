"""How fast a slim network is: FP32 and INT8, dense and slim, timed in turns on the CPU."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from common.images.data import ImageSet
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, time_interleaved
from common.network.size import count_macs, saved_size_bytes
from common.network.tracing import trace_network
from quantization.calibration import CalibrationSetup
from quantization.files.int8_file import save_int8
from quantization.int8 import engines
from quantization.steps import quantize

TIMED_BATCH_SIZES = (1, 32, 128)
SECONDS_PER_BATCH_SIZE = 8.0
BATCH_SIZE = 128


def measure_models(
    dense: nn.Module, slim: nn.Module, calibration: ImageSet, images: ImageSet
) -> list[dict]:
    """Quantize both networks, and evaluate and time all four, on the CPU with the best engine.

    Args:
        dense: In eval mode, on any device; not changed.
        slim: The same.
        calibration: Training images; labels are not used.
        images: To evaluate on; none of them has chosen the slim network.

    Returns:
        Entries of results.json: ``dense fp32``, ``dense int8``, ``slim fp32`` and ``slim int8``.
    """
    calibration, images = (dataset.to(torch.device("cpu")) for dataset in (calibration, images))
    settings = engines.choose_settings(engines.fastest_engine())
    setup = CalibrationSetup(calibration, images, BATCH_SIZE)
    contenders, correct, macs, sizes = [], {}, {}, {}
    for name, model in (("dense", dense), ("slim", slim)):
        model = copy.deepcopy(model).cpu()
        network = trace_network(model, images.shape)
        best = engines.fp32_runner(network)
        (int8,) = quantize(network, setup, [settings])
        contenders += [Contender(f"{name} fp32", best), Contender(f"{name} int8", int8.model)]
        fp32 = predict(best, images, BATCH_SIZE, f"evaluate {name}")
        correct[f"{name} fp32"] = fp32 == images.labels
        correct[f"{name} int8"] = int8.predictions == images.labels
        with tempfile.TemporaryDirectory() as folder:
            int8_bytes = save_int8(int8.model.network, Path(folder, "model.safetensors"))
        sizes |= {
            f"{name} fp32": saved_size_bytes(model.state_dict()), f"{name} int8": int8_bytes,
        }  # fmt: skip
        macs[name] = count_macs(network)
    timings = time_interleaved(
        contenders, images.normalize(images.images[: max(TIMED_BATCH_SIZES)]), TIMED_BATCH_SIZES,
        SECONDS_PER_BATCH_SIZE,
    )  # fmt: skip
    return [
        {
            "name": name,
            "engine": settings.engine if name.endswith("int8") else None,
            "macs": macs[name.split()[0]],
            "size_bytes": size_bytes,
            **Paired.of(correct["dense fp32"], correct[name]).as_dict(),
            "latency": [timing.as_dict() for timing in timings[name]],
        }
        for name, size_bytes in sizes.items()
    ]
