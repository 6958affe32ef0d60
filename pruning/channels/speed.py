"""How fast a slim network is: FP32 and INT8, dense and slim, timed in turns on the CPU."""

from __future__ import annotations

import copy

import torch
from quantization.bench import Bench

from common.images.data import ImageSet
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, time_interleaved
from common.network.resnet import ResNet18
from common.network.size import count_macs, saved_size_bytes
from common.network.tracing import trace_network
from quantization.int8 import deploy, engines
from quantization.steps import quantize

TIMED_BATCH_SIZES = (1, 32, 128)
SECONDS_PER_BATCH_SIZE = 8.0
BATCH_SIZE = 128


def measure_models(
    dense: ResNet18, slim: ResNet18, calibration: ImageSet, images: ImageSet
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
    contenders, correct, models = [], {}, {}
    for name, model in (("dense", dense), ("slim", slim)):
        model = copy.deepcopy(model).cpu()
        best = deploy.deploy_fp32(model)
        (int8,) = quantize(model, Bench(calibration, images, BATCH_SIZE), [settings])
        contenders += [
            Contender(f"{name} fp32", best), Contender(f"{name} int8", int8.deployed),
        ]  # fmt: skip
        fp32 = predict(best, images, BATCH_SIZE, f"evaluate {name}")
        correct[f"{name} fp32"] = fp32 == images.labels
        correct[f"{name} int8"] = int8.predictions == images.labels
        models |= {f"{name} fp32": model, f"{name} int8": int8.model}
    timings = time_interleaved(
        contenders, images.normalize(images.images[: max(TIMED_BATCH_SIZES)]), TIMED_BATCH_SIZES,
        SECONDS_PER_BATCH_SIZE,
    )  # fmt: skip
    macs = {
        name: count_macs(trace_network(models[f"{name} fp32"], images.shape))
        for name in ("dense", "slim")
    }
    return [
        {
            "name": name,
            "engine": settings.engine if name.endswith("int8") else None,
            "macs": macs[name.split()[0]],
            "size_bytes": saved_size_bytes(model.state_dict()),
            **Paired.of(correct["dense fp32"], correct[name]).as_dict(),
            "latency": [timing.as_dict() for timing in timings[name]],
        }
        for name, model in models.items()
    ]
