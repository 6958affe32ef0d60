"""The page that quantization.py's ``--report`` writes: what it tells of a results.json."""

from __future__ import annotations

from common.html_report import Story, Table
from common.report import megabytes, percent, points
from quantization.plots import label
from quantization.tables import model_table

CAPTIONS = {
    "overview.png": "A quarter of the bytes, the accuracy with its 95 % interval, and the images "
    "that each model gets through in a second.",
    "ranges.png": "What 8 bits have to cover: the spread of the weights' ranges over a layer's "
    "channels, and how much of what calibration saw INT8 keeps of each activation.",
    "flips.png": "Images that FP32 and INT8 answer differently, losses first: most are close calls "
    "for people too.",
    "diagnosis.png": "Where INT8 hurts: each layer's noise, and what accuracy it costs with that "
    "layer alone in INT8 or alone in FP32.",
    "calibration_study.png": "How much the choice of observer, the number of calibration images "
    "and the seed matter.",
}


def tell(results: dict) -> Story:
    """Return what a run of quantization.py has to tell."""
    int8 = next(model for model in results["models"] if model["name"] == "int8")
    comparison, fp32 = int8["comparison"], results["models"][0]
    accuracy, speedups = comparison["accuracy"], comparison["speedup"]
    low, high = (points(-limit) for limit in reversed(accuracy["ci95"]))
    fastest = max(speedups, key=lambda entry: entry["value"])
    arguments, images = results["arguments"], results["data"]
    return Story(
        title="ResNet18 for CIFAR‑10 in INT8",
        question="How much smaller and faster does the network get in INT8 on this CPU, and what "
        f"does that cost? Asked for: {', '.join(arguments['engines'])}, calibrated on "
        f"{images['calibration_images']:,} training images with the {arguments['observer']} "
        f"observer, tested on {images['test_images']:,} test images ({images['source']}).",
        numbers=[
            (f"{1 / comparison['size_ratio']:.2f}× smaller",
             f"{megabytes(fp32['size_bytes'])} to {megabytes(int8['size_bytes'])}"),
            (f"{points(-accuracy['drop'])} points",
             f"95 % interval {low} to {high}; FP32 {percent(fp32['accuracy']['value'])}"),
            (f"{fastest['value']:.2f}× faster",
             f"at batch {fastest['batch_size']}, than FP32 at its best"),
        ],
        findings=_findings(results, int8),
        tables=_tables(results),
        captions=CAPTIONS,
    )  # fmt: skip


def _findings(results: dict, int8: dict) -> list[str]:
    accuracy, floating = int8["comparison"]["accuracy"], int8["fp32_operations"]
    count = len(int8["int8_operations"]) + len(floating)
    coverage = f"All {count} operations run in INT8."
    if floating:
        names = ", ".join(operation["name"] for operation in floating)
        coverage = f"{len(floating)} of {count} operations run in FP32: {names}."
    found = [
        f"{label(int8)} gets {accuracy['only_a_correct']} images wrong that FP32 gets right, and "
        f"{accuracy['only_b_correct']} right that FP32 gets wrong "
        f"(McNemar p = {accuracy['mcnemar_p']:.2g}). {coverage}"
    ]
    if "budget" in results:
        budget = results["budget"]
        verdict = "met" if budget["met"] else "not met"
        found.append(f"The budget of {100 * budget['max_drop']:g} points was {verdict}.")
    if "sparsity" in results:
        sparsity, packed = results["sparsity"], results["sparsity"]["packed"]
        found.append(
            f"The network came pruned: {percent(sparsity['zeros_before'] / sparsity['weights'])} "
            "of its weights are zero, and every one of them still is. Packed, the file has "
            f"{megabytes(packed['size_bytes'])}: {1 / packed['size_ratio']:.1f}× smaller than FP32."
        )
    return found


def _tables(results: dict) -> list[Table]:
    note = "Images a second at each batch size; models took turns on the same images."
    tables = [Table("Models", *model_table(results["models"]), note)]
    if "budget" in results:
        rows = [
            [step["action"], points(-step["drop"]), "yes" if step["kept"] else "no"]
            for step in results["budget"]["steps"]
        ]
        header = ["tried, on held-out training images", "points", "kept"]
        tables.append(Table("The way to the budget", header, rows))
    return tables
