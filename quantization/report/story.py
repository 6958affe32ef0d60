"""What quantization.py tells: sizes, accuracies and speeds, and what else was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from common.report.results import (
    accuracy_columns,
    change_columns,
    describe_setting,
    format_change,
    format_cost,
    megabytes,
    p_value,
    percent,
    points,
    rate_columns,
)
from common.report.story import Column, Facts, Headline, Story, Table
from quantization.report.results import int8_entries

NOISIEST_SHOWN = 5
CAPTIONS = {
    "overview.png": "Bytes, accuracy with its 95 % interval, and images a second of each model.",
    "ranges.png": "What 8 bits have to cover: the ranges of each layer's weights over its channels, "
    "and how much of each activation's range INT8 keeps.",
    "flips.png": "Images that FP32 and INT8 answer differently, losses first.",
    "diagnosis.png": "Where INT8 hurts: each layer's noise, and the accuracy with that layer alone "
    "in INT8 or alone in FP32.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    first = int8_entries(results)[0]
    parts = [model_table(results["models"])]
    parts += [describe_comparison(model) for model in int8_entries(results)]
    parts += [describe_agreement(model) for model in results["models"] if "agreement" in model]
    parts.append(describe_classes(results["per_class"]))
    if "budget" in results:
        parts += tell_budget(results["budget"])
    if "diagnosis" in results:
        parts.append(diagnosis_table(results["diagnosis"]))
    if "coding" in results:
        parts.append(describe_coding(results["coding"]))
    return Story(
        f"{results['network']['name']} in INT8",
        describe_setting(results),
        _headlines(results["models"], first),
        parts,
        CAPTIONS,
        format_cost(results),
    )


def label(model: dict, short: bool = False) -> str:
    """Name an entry of results.json's ``models`` for people; ``short`` for a narrow axis."""
    if model["name"] == "fp32":
        return "FP32" if short else "FP32 at its best"
    if model["name"] == "fp32-nchw":
        return "FP32 as usually written"
    if model["name"] == "int8-onnx":
        return "INT8\nONNX" if short else "INT8 ONNX Runtime"
    return "INT8\n" * short + model["engine"] if short else f"INT8 {model['engine']}"


def model_table(models: Sequence[dict]) -> Table:
    """Return each model's size, accuracy and speed."""
    columns = [
        Column("images/s at", label, name="model"),
        Column("size", lambda model: model["size_bytes"], megabytes, name="size_bytes"),
        *accuracy_columns(),
        *rate_columns(models[0]["latency"]),
    ]
    return Table("", columns, models, "Models took turns on the same images.")


def _headlines(models: Sequence[dict], int8: dict) -> list[Headline]:
    comparison, fp32 = int8["comparison"], models[0]
    change = format_change(comparison["accuracy"])
    sizes = f"{megabytes(fp32['size_bytes'])} to {megabytes(int8['size_bytes'])}"
    return [
        Headline(f"{1 / comparison['size_ratio']:.2f}× smaller", f"than FP32: {sizes}"),
        Headline(f"{change.points} points", f"95 % interval {change.low} to {change.high}"),
        *(
            Headline(
                f"{entry['value']:.2f}× faster",
                f"than FP32 at its best, at batch {entry['batch_size']}",
            )
            for entry in comparison["speedup"]
        ),
    ]


def describe_comparison(model: dict) -> Facts:
    """Say what an INT8 model gains and costs."""
    comparison, accuracy = model["comparison"], model["comparison"]["accuracy"]
    change = format_change(accuracy)
    speed = ", ".join(
        f"{entry['value']:.2f}× at batch {entry['batch_size']}" for entry in comparison["speedup"]
    )
    over_nchw = ", ".join(f"{entry['value']:.2f}×" for entry in model["speedup_over_nchw"])
    floating = [operation["name"] for operation in model["fp32_operations"]]
    total = len(model["int8_operations"]) + len(floating)
    coverage = f"all {total} operations in INT8"
    if floating:
        coverage = f"{len(floating)} of {total} operations in FP32: {', '.join(floating)}"
    return Facts(
        f"{label(model)} against FP32 on the same images",
        {
            "size": f"{percent(1 - comparison['size_ratio'], 1)} smaller "
            f"({1 / comparison['size_ratio']:.2f}×)",
            "accuracy": f"{change.points} points, 95 % interval {change.low} to {change.high}; "
            f"{accuracy['only_a_correct']} images lost, {accuracy['only_b_correct']} gained "
            f"(McNemar p = {p_value(accuracy['mcnemar_p'])})",
            "speed": f"{speed} (against FP32 as usually written: {over_nchw})",
            "coverage": coverage,
        },
    )


def describe_agreement(model: dict) -> str:
    """Say how often the ONNX file and torch predict the same class."""
    return (
        f"{model['file']} in ONNX Runtime agrees with the model that it was made from on "
        f"{percent(model['agreement'])} of the images."
    )


def describe_classes(rows: Sequence[dict]) -> str:
    """Name the class that changes most."""
    worst = max(rows, key=lambda row: abs(row["fp32"] - row["int8"]))
    if worst["fp32"] == worst["int8"]:
        return "The accuracy of no class changes."
    return (
        f"The class that changes most is {worst['class']}: {percent(worst['fp32'])} to "
        f"{percent(worst['int8'])} ({points(worst['int8'] - worst['fp32'])} points)."
    )


def tell_budget(budget: dict) -> list[Table | str]:
    """Say what was tried to hold the accuracy budget, and whether it held."""
    verdict = "was met" if budget["met"] else "was NOT met: the best model found was written"
    columns = [
        Column("tried, on held-out training images", lambda step: step["action"]),
        Column("points", lambda step: -step["drop"], points),
        Column("", lambda step: "kept" if step["kept"] else "–"),
    ]
    return [
        f"The accuracy budget of {100 * budget['max_drop']:g} points {verdict}: "
        f"{points(-budget['held_out_drop'])} points on the held-out training images "
        f"({budget['held_out_engine']}), {points(-budget['test_drop'])} on the test images "
        f"({budget['test_engine']}).",
        Table("The way to the budget", columns, budget["steps"]),
    ]


def diagnosis_table(rows: Sequence[dict]) -> Table:
    """Name the layers that INT8 hurts most."""
    def decibels(value: float) -> str:
        return f"{value:.1f} dB"

    columns = [
        Column("layer", lambda row: row["layer"]),
        Column("SQNR", lambda row: row["sqnr_db"], decibels),
        Column("weights", lambda row: row["weight_sqnr_db"], decibels),
        Column("activations", lambda row: row["activation_sqnr_db"], decibels),
        Column("alone INT8", lambda row: -row["drop_only_quantized"], points),
        Column("alone FP32", lambda row: -row["drop_only_fp32"], points),
    ]
    worst = sorted(rows, key=lambda row: row["sqnr_db"])[:NOISIEST_SHOWN]
    return Table("The noisiest layers", columns, worst, "The last two are points against FP32.")


def describe_coding(coding: dict) -> Facts:
    """Describe the coded file."""
    change = format_change(coding["comparison"])
    return Facts(
        f"The coded file: {coding['file']}",
        {
            "size": f"{megabytes(coding['file_bytes'])}, {1 / coding['size_ratio']:.1f}× smaller "
            f"than FP32; {coding['bits_per_weight']:.2f} bits a weight",
            "accuracy": f"{percent(coding['accuracy']['value'])}: {change.points} points, 95 % "
            f"interval {change.low} to {change.high}",
        },
    )
