"""The steps of pipeline.py: from loaded inputs to files that were read back and measured."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.files.output import OutputFolder
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.inputs import Inputs
from common.machine.fresh_process import start_fresh
from common.measure.evaluate import predict
from common.network.checkpoint import save_checkpoint
from pipeline.answers import Found
from pipeline.candidates import CandidateBuilder
from pipeline.results import FP32, INT8, describe, measure_files
from pruning.files.saved import SLIM_ENDING
from quantization.files.artifact import load_int8
from quantization.files.int8_file import SUFFIX
from quantization.files.onnx_export import export_onnx, load_onnx
from quantization.settings import Settings
from training.loop.distillation import Training


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
    """Write every answer's file, and the slim network of the fastest one as a checkpoint.

    Return the answers' files by goal; all names begin with ``stem``.
    """
    files = {}
    for goal, best in found.best.items():
        files[goal] = folder.file(f"{stem}_{goal}{SUFFIX}")
        shutil.copyfile(best.path, files[goal])
    slim = found.best.get("speed") or found.best.get("both")
    if slim is not None:
        shutil.copyfile(slim.slim_path, folder.file(f"{stem}{SLIM_ENDING}"))
    return files


def measure(
    builder: CandidateBuilder,
    found: Found,
    files: Mapping[str, Path],
    confirming: ImageSet,
    batch_sizes: Sequence[int],
    seconds: float,
) -> dict:
    """Return results.json's ``models``, ``answers`` and ``tried``, all of files read back.

    ``files`` are the answers' by goal, ``confirming`` the images that chose nothing.
    """
    store, dense = builder.store, builder.inputs.model
    fp32 = store.folder / "dense.pth"
    save_checkpoint(dense.state_dict(), fp32)
    _, int8 = store.int8("dense-int8", lambda: builder.quantize(dense))
    # A coded network runs as fast as the same one uncoded, so of those tried these are timed.
    stems = [candidate.slim_path.stem for candidate in found.tried]
    tried = {stem: store.folder / f"{stem}-int8{SUFFIX}" for stem in stems}
    evaluated = {INT8: int8} | dict(files)
    with start_fresh(
        measure_files, builder.inputs.traced.network, evaluated, tried, confirming,
        builder.batch_size, batch_sizes, seconds,
    ) as wait:  # fmt: skip
        measured = wait()
    return describe(builder, found, measured, {FP32: fp32} | evaluated)


def export_answers_to_onnx(
    answers: Sequence[dict], files: Mapping[str, Path], images: ImageSet, batch_size: int
) -> None:
    """Write each answer as ONNX beside its file, and add how often both predict the same class.

    ``answers`` are those of results.json, changed in place; ``files`` are theirs by goal.
    """
    for answer in answers:
        model = load_int8(files[answer["name"]])
        path = files[answer["name"]].with_suffix(".onnx")
        export_onnx(model.network, path)
        ours = predict(model, images, batch_size, "INT8")
        theirs = predict(load_onnx(path), images, batch_size, "ONNX Runtime")
        agreement = float((ours == theirs).double().mean())
        answer["onnx"] = {"file": path.name, "agreement": agreement}
