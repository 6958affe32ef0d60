"""The steps of pipeline.py: files are written, and measured by a process that made none of them."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.inputs import Inputs
from common.machine.fresh_process import start_fresh
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, speedups, time_interleaved
from common.network.execution import Network
from common.network.size import saved_size_bytes
from pipeline.answers import Found
from pipeline.candidates import Candidate, CandidateBuilder
from quantization.files.artifact import load_int8
from quantization.files.int8_file import SUFFIX
from quantization.int8.engines import fp32_runner
from quantization.settings import Settings
from quantization.steps import CalibrationSetup, export_onnx
from training.loop.distillation import Training

FP32, INT8 = "fp32", "int8"


def identify(
    inputs: Inputs, settings: Settings, batch_size: int, training: Training | None
) -> dict[str, object]:
    """Return what the networks of a run depend on, named for the user; goals and budget are not."""
    return inputs.identify() | {
        SCRIPT: "pipeline",
        "the seed": inputs.seed,
        "the settings of INT8": repr(sorted(asdict(settings).items())),
        "torch": torch.__version__,
        "the number of threads": torch.get_num_threads(),
        "the batch size": batch_size,
        "the epochs of training": training and training.epochs,
        "the training images": training and checksum([training.images.images]),
        "the device": training and training.images.images.device.type,
    }


def write_files(found: Found, folder: OutputFolder, stem: str) -> dict[str, Path]:
    """Write each answer's file, and the fastest one's slim network; return the files by goal."""
    files = {}
    for goal, best in found.best.items():
        files[goal] = folder.file(f"{stem}_{goal}{SUFFIX}")
        shutil.copyfile(best.path, files[goal])
    slim = found.best.get("speed") or found.best.get("both")
    if slim is not None:
        shutil.copyfile(slim.slim_path, folder.file(f"{stem}_slim.pth"))
    return files


def measure_files(
    fp32: Network, int8: dict[str, Path], images: ImageSet, batch_size: int,
    timed: Sequence[int], seconds: float,
) -> dict[str, dict]:  # fmt: skip
    """Read INT8 files; evaluate one after the other, then time all in turns.

    Return ``accuracy``, ``comparison`` with the dense network ``fp32``, and ``latency`` of
    results.json by name, its own under ``FP32``.
    """
    readers = {FP32: partial(fp32_runner, fp32)}
    readers |= {name: partial(load_int8, path) for name, path in int8.items()}
    correct = {  # a network at a time: none is held while another is evaluated
        name: predict(read(), images, batch_size, f"read back {name}") == images.labels
        for name, read in readers.items()
    }
    contenders = [Contender(name, read()) for name, read in readers.items()]
    pixels = images.normalize(images.images[: max(timed)])
    timings = time_interleaved(contenders, pixels, timed, seconds)
    return {
        name: {"latency": [timing.as_dict() for timing in timings[name]]}
        | Paired.of(correct[FP32], own).as_dict()
        for name, own in correct.items()
    }


def measure(
    builder: CandidateBuilder, files: Mapping[str, Path], confirming: ImageSet,
    batch_sizes: Sequence[int], seconds: float,
) -> dict[str, dict]:  # fmt: skip
    """Measure the dense models and the answers, read back, on images that chose nothing.

    Return what :func:`measure_files` does, with name, engine and size in the dense models' entries.
    """
    model = builder.inputs.model
    _, int8 = builder.store.int8("dense-int8", lambda: builder.quantize(model))
    with start_fresh(
        measure_files, builder.inputs.traced.network, {INT8: int8, **files}, confirming,
        builder.batch_size, batch_sizes, seconds,
    ) as wait:  # fmt: skip
        measured = wait()
    sizes_bytes = {FP32: saved_size_bytes(model.state_dict()), INT8: int8.stat().st_size}
    for name, engine in ((FP32, None), (INT8, builder.settings.engine)):
        facts = {"name": name, "engine": engine, "size_bytes": sizes_bytes[name]}
        measured[name] = facts | measured[name]
    return measured


def describe(
    builder: CandidateBuilder, found: Found, files: Mapping[str, Path], measured: Mapping[str, dict]
) -> dict:
    """Return ``models``, ``answers`` and, on the images that choose, ``tried`` of results.json."""
    models, inputs = [measured[FP32], measured[INT8]], builder.inputs
    dense = {f"over_{model['name']}": model["latency"] for model in models}
    answers = []
    for goal, best in found.best.items():
        own, passes = measured[goal], best.verdict.passes
        answers.append({
            "name": goal,
            "file": files[goal].name,
            **_describe(best, models[0], inputs),
            "within_budget": passes and own["comparison"]["drop"] <= builder.budget.max_drop,
            **own,
            "speedup": speedups(own["latency"], **dense),
        })  # fmt: skip
    tried = [
        {
            "goal": candidate.goal,
            **_describe(candidate, models[0], inputs),
            "passes": candidate.verdict.passes,
            "images": candidate.verdict.accuracy.total,
            "comparison": candidate.verdict.comparison.as_dict(),
        }
        for candidate in found.tried
    ]
    return {"models": models, "answers": answers, "tried": tried}


def _describe(candidate: Candidate, fp32: dict, inputs: Inputs) -> dict:
    """Return what is said of answers and of what was tried; ``fp32`` is the entry of models."""
    return {
        "file_bytes": candidate.file_bytes,
        "size_ratio": fp32["size_bytes"] / candidate.file_bytes,
        "size_ratio_given": inputs.weights["size_bytes"] / candidate.file_bytes,
        "macs_kept": candidate.macs / sum(inputs.traced.network.macs.values()),
        "trained": candidate.trained,
    }


def export_answers_to_onnx(
    answers: Sequence[dict], files: Mapping[str, Path], setup: CalibrationSetup
) -> None:
    """Write each answer as ONNX beside its file, and add to it how often both classify alike."""
    for answer in answers:
        model, path = load_int8(files[answer["name"]]), files[answer["name"]].with_suffix(".onnx")
        onnx = export_onnx(model.network, setup.predict(model, "evaluate INT8"), path, setup)
        answer["onnx"] = {"file": path.name, "agreement": onnx.agreement}
