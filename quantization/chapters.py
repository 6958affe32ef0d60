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
from common.data import Cifar10
from common.latency import Timing
from common.model import ResNet18, fold_batch_norm
from common.output import OutputFolder
from common.sources import Source
from quantization import diagnosis, experiment, inspection, plots, ranges, sparsity, study, tables
from quantization.budget import Plan
from quantization.experiment import OnnxModel, Quantized
from quantization.results import describe_budget, describe_models, int8_entries
from quantization.settings import Settings

OVERVIEW_PLOT, RANGES_PLOT, FLIPS_PLOT = "overview.png", "ranges.png", "flips.png"
DIAGNOSIS_PLOT, DIAGNOSIS_CSV = "diagnosis.png", "diagnosis.csv"
STUDY_PLOT = "calibration_study.png"
MODEL_SUFFIXES = (".pth", ".pt", ".onnx", ".safetensors")


@dataclass
class Account:
    """What a run has to tell.

    Attributes:
        results: Of results.json.
        folder: Of the files.
        sections: Of the console's report, after the main table.
    """

    results: dict
    folder: OutputFolder
    sections: list[str] = field(default_factory=list)


def add_study(
    account: Account,
    model: ResNet18,
    source: Source,
    test: Cifar10,
    fp32: torch.Tensor,
    settings: Settings,
    batch_size: int,
) -> None:
    """Compare calibrations; ``fp32`` are the predictions (int64, (N,)) to hold them against."""
    rows = study.run_study(model, source, test, fp32, settings, batch_size)
    fp32_accuracy = study.accuracy_of(fp32, test)
    account.results["calibration_study"] = study.as_dicts(rows)
    study.plot_study(rows, fp32_accuracy, account.folder.file(STUDY_PLOT))
    account.sections.append(study.format_study(rows, fp32_accuracy))


def save_models(
    account: Account, quantized: Sequence[Quantized], test: Cifar10
) -> dict[str, list[Path]]:
    """Write every engine's model, reload it, and return its files by engine."""
    return {
        candidate.settings.engine: experiment.save_and_verify(
            candidate, account.folder.file(artifact_name(candidate.settings.engine)), test
        )
        for candidate in quantized
    }


def add_models(
    account: Account,
    model: ResNet18,
    fp32: torch.Tensor,
    quantized: Sequence[Quantized],
    paths: dict[str, list[Path]],
    onnx: OnnxModel | None,
    test: Cifar10,
    timings: dict[str, list[Timing]],
) -> None:
    """Describe FP32, the INT8 models, of which the first makes the headline, and the ONNX file."""
    results, first = account.results, quantized[0]
    results["models"] = describe_models(model, fp32, quantized, paths, onnx, test, timings)
    results["comparison"] = int8_entries(results)[0]["comparison"]
    results["per_class"] = inspection.accuracy_by_class(test.labels, fp32, first.predictions)
    plots.plot_overview(results["models"], account.folder.file(OVERVIEW_PLOT))
    inspection.plot_flips(test, fp32, first.predictions, account.folder.file(FLIPS_PLOT))


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


def add_diagnosis(
    account: Account,
    source_model: ResNet18,
    quantized: Quantized,
    calibration: Cifar10,
    test: Cifar10,
    batch_size: int,
) -> None:
    """Measure what quantizing each layer of ``source_model`` costs."""
    rows = diagnosis.diagnose(
        source_model, quantized.observed, quantized.settings, calibration, test, batch_size
    )
    account.results["diagnosis"] = rows
    report.write_csv(account.folder.file(DIAGNOSIS_CSV), rows)
    plots.plot_diagnosis(rows, account.folder.file(DIAGNOSIS_PLOT))
    account.sections.append(tables.format_diagnosis(rows))


def add_sparsity(account: Account, model: ResNet18, quantized: Quantized, test: Cifar10) -> None:
    """Check that a pruned model's zeros are still zeros, and write it packed."""
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
