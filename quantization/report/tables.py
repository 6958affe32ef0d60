"""What quantization.py prints: results.json's story for a terminal 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.report.results import (
    format_change,
    format_ending,
    format_given,
    format_table,
    megabytes,
    p_value,
    percent,
    points,
)
from quantization.coding.smallest import format_coding
from quantization.report.results import int8_entries

WORST_SHOWN = 5


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out the table of models, each INT8 model's comparison, and what else was asked for."""
    environment, threads = results["environment"], results["environment"]["threads"]
    parts = [
        f"ResNet18 on CIFAR-10: {results['data']['test_images']:,} test images "
        f"({results['data']['source']}), {threads} thread{'s' * (threads != 1)}\n"
        f"{environment['cpu']}\n",
        format_table(*model_table(results["models"])) + "\n",
        format_given(results["weights"]) + "\n",
        *(format_comparison(model) for model in int8_entries(results)),
        *([format_fastest(results["fastest"])] if len(int8_entries(results)) > 1 else []),
        *(format_agreement(model) for model in results["models"] if "agreement" in model),
        format_classes(results["per_class"]),
        *(tell(results[name]) for name, tell in SECTIONS.items() if name in results),
        format_ending(results, output_dir),
    ]
    return "\n".join(parts)


def label(model: dict, short: bool = False) -> str:
    """Name an entry of results.json's ``models`` for people; ``short`` for a narrow axis."""
    if model["name"] == "fp32":
        return "FP32" if short else "FP32 at its best"
    if model["name"] == "fp32-nchw":
        return "FP32 as usually written"
    if model["name"] == "int8-onnx":
        return "INT8\nONNX" if short else "INT8 ONNX Runtime"
    return "INT8\n" * short + model["engine"] if short else f"INT8 {model['engine']}"


def model_table(models: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: each model's size, accuracy and speed."""
    batch_sizes = [entry["batch_size"] for entry in models[0]["latency"]]
    header = ["images/s at", "size", "accuracy", *(f"batch {size}" for size in batch_sizes)]
    rows = [
        [
            label(model),
            megabytes(model["size_bytes"]),
            percent(model["accuracy"]["value"]),
            *(f"{entry['images_per_second']:,.0f}" for entry in model["latency"]),
        ]
        for model in models
    ]
    return header, rows


def format_comparison(model: dict) -> str:
    """Say what an INT8 model gains and costs."""
    comparison, accuracy = model["comparison"], model["comparison"]["accuracy"]
    change = format_change(accuracy)
    speedups = ", ".join(
        f"{entry['value']:.2f}× at batch {entry['batch_size']}" for entry in comparison["speedup"]
    )
    over_nchw = ", ".join(f"{entry['value']:.2f}×" for entry in model["speedup_over_nchw"])
    floating = [operation["name"] for operation in model["fp32_operations"]]
    total = len(model["int8_operations"]) + len(floating)
    coverage = f"all {total} operations in INT8"
    if floating:
        coverage = f"{len(floating)} of {total} operations in FP32: {', '.join(floating)}"
    return (
        f"{label(model)} against FP32 on the same images\n"
        f"  size      {percent(1 - comparison['size_ratio'], 1)} smaller "
        f"({1 / comparison['size_ratio']:.2f}×); {1 / comparison['size_ratio_given']:.2f}× smaller "
        "than the given file\n"
        f"  accuracy  {change.points} points, 95 % interval {change.low} to {change.high}\n"
        f"            {accuracy['only_a_correct']} images lost, {accuracy['only_b_correct']} "
        f"gained (McNemar p = {p_value(accuracy['mcnemar_p'], 2)})\n"
        f"  speed     {speedups}\n"
        f"            (against FP32 as usually written: {over_nchw})\n"
        f"  coverage  {coverage}\n"
    )


def format_fastest(fastest: Sequence[dict]) -> str:
    """Name the fastest engine for each batch size."""
    engines = [f"{entry['engine']} at batch {entry['batch_size']}" for entry in fastest]
    return f"fastest: {', '.join(engines)}\n"


def format_agreement(model: dict) -> str:
    """Say how often the ONNX file and torch predict the same class."""
    return (
        f"{model['file']} in ONNX Runtime\n"
        f"  agrees with the model that it was made from on {percent(model['agreement'])} of the "
        "images\n"
    )


def format_classes(rows: Sequence[dict]) -> str:
    """Name the class that changes most."""
    worst = max(rows, key=lambda row: abs(row["fp32"] - row["int8"]))
    if worst["fp32"] == worst["int8"]:
        return "by class, no accuracy changes\n"
    change = points(worst["int8"] - worst["fp32"])
    return (
        f"by class, {worst['class']} changes most: {percent(worst['fp32'])} to "
        f"{percent(worst['int8'])} ({change} points)\n"
    )


def format_budget(budget: dict) -> str:
    """Say what was tried to hold the accuracy budget, and whether it held."""
    verdict = "met" if budget["met"] else "NOT met: the best model found was written"
    rows = [
        [
            step["action"],
            points(-step["drop"]),
            points(step["spare"]),
            "kept" if step["kept"] else "–",
        ]
        for step in budget["steps"]
    ]
    header = ["tried, on held-out training images", "change", "to spare", ""]
    return (
        f"accuracy budget of {100 * budget['max_drop']:g} points: {verdict}\n"
        "  on held-out images the loss and one standard error must be within it,\n"
        "  on test images the loss\n\n"
        + format_table(header, rows)
        + f"\n{budget['held_out_images']:,} held-out training images, "
        f"{budget['held_out_engine']}: {points(-budget['held_out_drop'])} points, "
        f"{points(budget['held_out_spare'])} to spare\n"
        f"test images, {budget['test_engine']}: {points(-budget['test_drop'])} points\n"
    )


def format_sparsity(sparsity: dict) -> str:
    """Say that the zeros are still there; the file stores them in next to nothing."""
    weights, before, after = (sparsity[key] for key in ("weights", "zeros_before", "zeros_after"))
    return (
        f"a pruned network: {percent(before / weights)} of the weights are zero\n"
        f"  in INT8   every one of them still is; rounding adds {after - before:,}\n"
    )


def format_diagnosis(rows: Sequence[dict]) -> str:
    """Name the layers that INT8 hurts most."""
    worst = sorted(rows, key=lambda row: row["sqnr_db"])[:WORST_SHOWN]
    table = format_table(
        ["noisiest layers", "SQNR", "weights", "activations", "alone INT8", "alone FP32"],
        [
            [
                row["layer"],
                f"{row['sqnr_db']:.1f} dB",
                f"{row['weight_sqnr_db']:.1f} dB",
                f"{row['activation_sqnr_db']:.1f} dB",
                points(-row["drop_only_quantized"]),
                points(-row["drop_only_fp32"]),
            ]
            for row in worst
        ],
    )
    return f"diagnosis (accuracy in points against FP32)\n{table}\n"


SECTIONS = {
    "budget": format_budget,
    "diagnosis": format_diagnosis,
    "sparsity": format_sparsity,
    "coding": format_coding,
}
