"""The chapters of quantization.py's account: each adds to results.json, the files and the console.

A chapter is a few lines that say what belongs together; what it measures, lays out or draws is the
work of its own module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import report
from common.inputs import Inputs
from common.model import ResNet18, fold_batch_norm
from common.output import OutputFolder
from quantization import diagnosis, experiment, inspection, plots, ranges, sparsity, study, tables
from quantization.budget import Plan
from quantization.experiment import Quantized
from quantization.results import describe_budget, describe_models, int8_entries
from quantization.settings import Settings

OVERVIEW_PLOT, RANGES_PLOT, FLIPS_PLOT = "overview.png", "ranges.png", "flips.png"
DIAGNOSIS_PLOT, DIAGNOSIS_CSV = "diagnosis.png", "diagnosis.csv"
STUDY_PLOT = "calibration_study.png"
ONNX_NAME = "resnet18_cifar10_int8.onnx"
MODEL_SUFFIXES = (".pth", ".pt", ".onnx", ".safetensors")


@dataclass
class Account:
    """What a run has to tell, and of what.

    Attributes:
        results: Of results.json.
        folder: Of the files.
        inputs: The FP32 model and the images.
        fp32: FP32's predictions on the test images (int64, shape (N,)).
        batch_size: In images.
        sections: Of the console's report, after the main table.
    """

    results: dict
    folder: OutputFolder
    inputs: Inputs
    fp32: torch.Tensor
    batch_size: int
    sections: list[str] = field(default_factory=list)


def add_study(account: Account, settings: Settings) -> None:
    """Compare calibrations: observers, numbers of images and seeds."""
    inputs, fp32 = account.inputs, account.fp32
    rows = study.run_study(
        inputs.model, inputs.source, inputs.test, fp32, settings, account.batch_size
    )
    fp32_accuracy = study.accuracy_of(fp32, inputs.test)
    account.results["calibration_study"] = study.as_dicts(rows)
    study.plot_study(rows, fp32_accuracy, account.folder.file(STUDY_PLOT))
    account.sections.append(study.format_study(rows, fp32_accuracy))


def add_models(
    account: Account,
    quantized: Sequence[Quantized],
    with_onnx: bool,
    pick_fastest: bool,
    batch_sizes: Sequence[int],
    seconds: float,
) -> Quantized:
    """Write every INT8 model, time it against FP32, and describe them all.

    Args:
        account: Changed in place.
        quantized: The INT8 models, one an engine.
        with_onnx: Write the first as ONNX too, and measure that.
        pick_fastest: Let the fastest make the headline, rather than the first.
        batch_sizes: To time, in images.
        seconds: To spend on each.

    Returns:
        The INT8 model that makes the headline.
    """
    model, test, fp32 = account.inputs.model, account.inputs.test, account.fp32
    results, file = account.results, account.folder.file
    paths, onnx = _save_models(account, quantized), None
    if with_onnx:
        onnx = experiment.export_onnx(quantized[0], file(ONNX_NAME), test, account.batch_size)
    timings = experiment.time_models(model, quantized, onnx, test, batch_sizes, seconds)
    if pick_fastest:
        quantized = experiment.fastest_first(quantized, timings)
    first = quantized[0]
    results["models"] = describe_models(model, fp32, quantized, paths, onnx, test, timings)
    results["comparison"] = int8_entries(results)[0]["comparison"]
    results["per_class"] = inspection.accuracy_by_class(test.labels, fp32, first.predictions)
    plots.plot_overview(results["models"], file(OVERVIEW_PLOT))
    inspection.plot_flips(test, fp32, first.predictions, file(FLIPS_PLOT))
    return first


def _save_models(account: Account, quantized: Sequence[Quantized]) -> dict[str, list[Path]]:
    """Write every engine's model, reload it, and return its files by engine."""
    return {
        candidate.settings.engine: experiment.save_and_verify(
            candidate,
            account.folder.file(artifact_name(candidate.settings.engine)),
            account.inputs.test,
        )
        for candidate in quantized
    }


def add_ranges(account: Account, source_model: ResNet18, quantized: Quantized) -> None:
    """Draw the ranges of weights and activations; ``source_model`` is what was quantized."""
    plots.plot_ranges(
        ranges.weight_ranges(fold_batch_norm(source_model)),
        ranges.activation_ranges(quantized.observed),
        account.folder.file(RANGES_PLOT),
    )


def add_budget(account: Account, plan: Plan, max_drop: float) -> None:
    """Say how the budget was met, or not."""
    account.results["budget"] = describe_budget(plan, max_drop, account.results)
    account.sections.append(tables.format_budget(account.results["budget"]))


def add_diagnosis(account: Account, source_model: ResNet18, quantized: Quantized) -> None:
    """Measure what quantizing each layer of ``source_model`` costs."""
    rows = diagnosis.diagnose(
        source_model,
        quantized.observed,
        quantized.settings,
        account.inputs.calibration,
        account.inputs.test,
        account.batch_size,
    )
    account.results["diagnosis"] = rows
    report.write_csv(account.folder.file(DIAGNOSIS_CSV), rows)
    plots.plot_diagnosis(rows, account.folder.file(DIAGNOSIS_PLOT))
    account.sections.append(tables.format_diagnosis(rows))


def add_sparsity(account: Account, quantized: Quantized) -> None:
    """Check that a pruned model's zeros are still zeros, and write it packed."""
    model, test = account.inputs.model, account.inputs.test
    if sparsity.measure_sparsity(model) < sparsity.MIN_SPARSITY:
        return
    path = account.folder.file(sparsity.PACKED_NAME)
    fp32_bytes = account.results["models"][0]["size_bytes"]
    account.results["sparsity"] = sparsity.describe_sparsity(
        model, quantized, fp32_bytes, path, test
    )
    account.sections.append(tables.format_sparsity(account.results["sparsity"]))


def list_artifacts(account: Account, quantized: Quantized) -> None:
    """Name every file that was written."""
    names = account.folder.names
    account.results["artifacts"] = {
        "model": artifact_name(quantized.settings.engine),
        "models": [name for suffix in MODEL_SUFFIXES for name in names(suffix)],
        "csv": names(".csv"),
        "plots": names(".png"),
    }


def artifact_name(engine: str) -> str:
    """Return the file name of an engine's INT8 model; fbgemm's is the plain one."""
    stem = "resnet18_cifar10_int8"
    return f"{stem}.pth" if engine == "fbgemm" else f"{stem}_{engine}.pth"
