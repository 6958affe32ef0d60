"""What results.json says of the models, each against FP32, and of the accuracy budget."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure import evaluate
from common.measure.latency import Timing, speedups
from common.network.execution import Network
from common.network.size import saved_size_bytes
from quantization.accuracy.budget import Plan
from quantization.int8.network import Int8Network
from quantization.steps import FP32, FP32_NCHW, ONNX, OnnxModel, Quantized

# Below this fraction of zeros a network was not pruned: single weights may be zero by chance.
MIN_SPARSITY = 0.01


def describe_models(
    inputs: Inputs, predictions: torch.Tensor, quantized: Sequence[Quantized],
    paths: dict[str, Path], onnx: OnnxModel | None, timings: dict[str, list[Timing]],
) -> dict:  # fmt: skip
    """Return results.json's ``models``, ``comparison``, ``fastest`` and ``per_class``.

    ``predictions`` are FP32's on the test images (int64, (N,)); the first of ``quantized`` is the
    headline; ``paths`` and ``timings`` are by engine.
    """
    test, dense = inputs.test, predictions == inputs.test.labels
    fp32_bytes = saved_size_bytes(inputs.model.state_dict())
    nchw, best = fp32 = [
        _entry(name, None, fp32_bytes, dense, timings[name]) for name in (FP32_NCHW, FP32)
    ]
    made = [
        ("int8", engine, paths[engine], one.predictions, timings[engine], _describe_conversion(one))
        for one, engine in ((one, one.settings.engine) for one in quantized)
    ]
    if onnx is not None:
        more = {"agreement": onnx.agreement}
        made.append((ONNX, "onnxruntime", onnx.path, onnx.predictions, timings[ONNX], more))
    entries = []
    for name, engine, path, predicted, timed, more in made:
        correct, size_bytes = predicted == test.labels, path.stat().st_size
        entry = _entry(name, engine, size_bytes, correct, timed)
        entry["comparison"] = {
            "size_ratio": size_bytes / fp32_bytes,
            "size_ratio_given": size_bytes / inputs.weights["size_bytes"],
            "accuracy": evaluate.compare(dense, correct).as_dict(),
            "speedup": speedups(entry["latency"], value=best["latency"]),
        }
        entry["speedup_over_nchw"] = speedups(entry["latency"], value=nchw["latency"])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(entry | {"file": path.name, "sha256": sha256} | more)
    return {
        "models": [*fp32, *entries],
        "comparison": entries[0]["comparison"],
        "fastest": fastest_engines({engine: timings[engine] for engine in paths}),
        "per_class": accuracy_by_class(test, predictions, quantized[0].predictions),
    }


def _entry(
    name: str, engine: str | None, size_bytes: int, correct: torch.Tensor, timings: Sequence[Timing]
) -> dict:
    """Return what is said of every model."""
    return {
        "name": name,
        "engine": engine,
        "size_bytes": size_bytes,
        "accuracy": evaluate.measure_accuracy(correct).as_dict(),
        "latency": [timing.as_dict() for timing in timings],
    }


def _describe_conversion(candidate: Quantized) -> dict:
    in_fp32 = candidate.model.fp32_operations
    names = [step.operation.name for step in candidate.model.network.steps()[1:]]
    return {
        "settings": asdict(candidate.settings),
        "int8_operations": [name for name in names if name not in in_fp32],
        "fp32_operations": [{"name": name, "reason": reason} for name, reason in in_fp32.items()],
    }


def fastest_engines(timings: dict[str, list[Timing]]) -> list[dict]:
    """Return the engine with the least median latency for each batch size."""
    found = []
    for timed in zip(*timings.values(), strict=True):
        medians_ms = [timing.median_ms for timing in timed]
        engine = list(timings)[medians_ms.index(min(medians_ms))]
        noisy = any(timing.is_noisy for timing in timed)
        found.append({"batch_size": timed[0].batch_size, "engine": engine, "noisy": noisy})
    return found


def int8_entries(results: dict) -> list[dict]:
    """Return the INT8 models of results.json."""
    return [model for model in results["models"] if model["name"] == "int8"]


def describe_budget(plan: Plan, max_drop: float, results: dict) -> dict:
    """Return results.json's ``budget``: met only if the test images agree with the plan.

    The held-out images chose the plan, so on these it leaves a standard error to spare; on the test
    images the drop itself counts. The headline may be of another engine than the plan's, the first.
    """
    headline = int8_entries(results)[0]
    test_drop = headline["comparison"]["accuracy"]["drop"]
    return {
        "max_drop": max_drop,
        "met": plan.verdict.passes and test_drop <= max_drop,
        "fp32_layers": list(plan.settings.fp32_layers),
        "held_out_images": plan.verdict.accuracy.total,
        "held_out_drop": plan.verdict.comparison.drop,
        "held_out_spare": plan.verdict.spare,
        "held_out_engine": plan.settings.engine,
        "test_drop": test_drop,
        "test_engine": headline["engine"],
        "steps": [asdict(step) for step in plan.steps],
    }


def describe_sparsity(network: Network, int8: Int8Network) -> dict:
    """Return results.json's ``sparsity`` if the network was pruned; check that no zero was lost.

    The zero point of weights is 0, and folding or equalising only scales them.
    """
    weights = before = after = 0
    for name in network.graph.layers:
        was_zero, is_zero = network.layers[name].weight == 0, int8.layers[name].weight == 0
        if lost := int((was_zero & ~is_zero).sum()):
            raise AssertionError(f"{name}: {lost} zeros are no longer zero in INT8")
        weights += was_zero.numel()
        before += int(was_zero.sum())
        after += int(is_zero.sum())
    if before < MIN_SPARSITY * weights:
        return {}
    return {"sparsity": {"weights": weights, "zeros_before": before, "zeros_after": after}}


def accuracy_by_class(test: ImageSet, fp32: torch.Tensor, int8: torch.Tensor) -> list[dict]:
    """Return each class's accuracy before and after, from predictions (int64, shape (N,))."""
    rows = []
    for index, name in enumerate(test.classes):
        of_class = test.labels == index
        if count := int(of_class.sum()):
            before, after = (int((p[of_class] == index).sum()) / count for p in (fp32, int8))
            rows.append({"class": name, "images": count, "fp32": before, "int8": after})
    return rows
