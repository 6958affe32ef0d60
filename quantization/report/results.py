"""What results.json says of the models, each against FP32, and of the accuracy budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.files.output import OutputFolder
from common.images.cifar10 import CLASSES
from common.images.data import Cifar10
from common.measure import evaluate
from common.measure.latency import Timing
from common.network.resnet import ResNet18
from common.network.size import saved_size_bytes
from quantization.accuracy.budget import Plan
from quantization.files import artifact
from quantization.int8.deploy import Quantized
from quantization.int8.operations import list_operations
from quantization.steps import FP32, FP32_NCHW, ONNX, OnnxModel

MODEL_SUFFIXES = (".pth", ".pt", ".onnx", ".safetensors")


def describe_models(
    model: ResNet18,
    predictions: torch.Tensor,
    quantized: Sequence[Quantized],
    paths: dict[str, list[Path]],
    onnx: OnnxModel | None,
    test: Cifar10,
    timings: dict[str, list[Timing]],
    given_bytes: int,
) -> dict:
    """Return results.json's ``models``: FP32 in both layouts, each INT8 model, the ONNX file.

    Beside them the first INT8 model's ``comparison`` and accuracy ``per_class``.

    Args:
        model: FP32.
        predictions: FP32's, on ``test``.
        quantized: The INT8 models, the headline's first.
        paths: The files of each engine's model, that with the state dict first.
        onnx: The exported model, if any.
        test: The images.
        timings: From :func:`quantization.steps.time_models`.
        given_bytes: Size of the file that the FP32 weights were read from.
    """
    dense = predictions == test.labels
    size_bytes = saved_size_bytes(model.state_dict())
    fp32 = [_entry(name, None, size_bytes, dense, timings[name]) for name in (FP32_NCHW, FP32)]

    def int8_entry(
        name: str, engine: str, path: Path, predicted: torch.Tensor, timed: Sequence[Timing]
    ) -> dict:
        correct = predicted == test.labels
        entry = _entry(name, engine, path.stat().st_size, correct, timed)
        entry |= {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        nchw, best = fp32
        return entry | {
            "comparison": {
                "size_ratio": entry["size_bytes"] / best["size_bytes"],
                "size_ratio_given": entry["size_bytes"] / given_bytes,
                "accuracy": evaluate.compare(dense, correct).as_dict(),
                "speedup": _speedups(best, entry),
            },
            "speedup_over_nchw": _speedups(nchw, entry),
        }

    entries = []
    for candidate in quantized:
        engine, predicted = candidate.settings.engine, candidate.predictions
        entry = int8_entry("int8", engine, paths[engine][0], predicted, timings[engine])
        entries.append(entry | _describe_conversion(candidate, paths[engine]))
    if onnx is not None:
        entry = int8_entry(ONNX, "onnxruntime", onnx.path, onnx.predictions, timings[ONNX])
        entries.append(entry | {"agreement": onnx.agreement})
    return {
        "models": [*fp32, *entries],
        "comparison": entries[0]["comparison"],
        "per_class": accuracy_by_class(test.labels, predictions, quantized[0].predictions),
    }


def _entry(
    name: str,
    engine: str | None,
    size_bytes: int,
    correct: torch.Tensor,
    timings: Sequence[Timing],
) -> dict:
    """Return what is said of every model."""
    return {
        "name": name,
        "engine": engine,
        "size_bytes": size_bytes,
        "accuracy": evaluate.measure_accuracy(correct).as_dict(),
        "latency": [timing.as_dict() for timing in timings],
    }


def _describe_conversion(candidate: Quantized, paths: Sequence[Path]) -> dict:
    operations = list_operations(candidate.model)
    return {
        "frozen": paths[1].name if len(paths) > 1 else None,
        "settings": asdict(candidate.settings),
        "int8_operations": [name for name, is_int8 in operations.items() if is_int8],
        "fp32_operations": [
            {"name": name, "reason": "kept in FP32 to hold the accuracy budget"}
            for name, is_int8 in operations.items()
            if not is_int8
        ],
    }


def _speedups(fp32: dict, int8: dict) -> list[dict]:
    """Return the ratio of median latencies by batch size; above 1 the INT8 entry is faster."""
    return [
        {"batch_size": b["batch_size"], "value": a["median_ms"] / b["median_ms"]}
        for a, b in zip(fp32["latency"], int8["latency"], strict=True)
    ]


def int8_entries(results: dict) -> list[dict]:
    """Return the INT8 models of results.json."""
    return [model for model in results["models"] if model["name"] == "int8"]


def describe_budget(plan: Plan, max_drop: float, results: dict) -> dict:
    """Return results.json's ``budget``: met only if the test images agree with the plan.

    The plan is made with the first engine asked for; the test images' drop is the headline's, which
    is another engine's where the fastest makes it.
    """
    headline = int8_entries(results)[0]
    test_drop = headline["comparison"]["accuracy"]["drop"]
    return {
        "max_drop": max_drop,
        "met": plan.drop <= max_drop and test_drop <= max_drop,
        "fp32_layers": list(plan.settings.fp32_layers),
        "held_out_drop": plan.drop,
        "held_out_engine": plan.settings.engine,
        "test_drop": test_drop,
        "test_engine": headline["engine"],
        "steps": [asdict(step) for step in plan.steps],
    }


def accuracy_by_class(labels: torch.Tensor, fp32: torch.Tensor, int8: torch.Tensor) -> list[dict]:
    """Return each class's accuracy before and after, from predictions (int64, shape (N,))."""
    rows = []
    for index, name in enumerate(CLASSES):
        of_class = labels == index
        if not of_class.any():
            continue
        before, after = ((p[of_class] == index).double().mean().item() for p in (fp32, int8))
        rows.append({"class": name, "images": int(of_class.sum()), "fp32": before, "int8": after})
    return rows


def list_artifacts(folder: OutputFolder, first: Quantized) -> dict:
    """Return results.json's ``artifacts``: every file that was written; ``first`` is the model."""
    names = folder.names
    return {
        "model": artifact.file_name(first.settings.engine),
        "models": [name for suffix in MODEL_SUFFIXES for name in names(suffix)],
        "csv": names(".csv"),
        "plots": names(".png"),
    }
