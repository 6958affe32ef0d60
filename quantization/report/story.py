"""What quantization.py tells: sizes, accuracies and speeds, and what else was asked for."""

from collections.abc import Sequence

from common.command.cli import counted
from common.report import results as report
from common.report.story import Column, Facts, Story, Table, how_to_load
from quantization.report import sections
from quantization.report.results import int8_entries

INT8_SHARE = 8 / 32  # bits of FP32 that INT8 takes
CAPTIONS = {
    "overview.png": "Bytes, accuracy with its 95 % interval, and images a second of each model.",
    "ranges.png": "What 8 bits have to cover: the spread of the weights' ranges over a layer's "
    "channels, and how much of what calibration saw INT8 keeps of each activation.",
    "flips.png": "Images that FP32 and INT8 answer differently, losses first: most are close calls "
    "for people too.",
    "diagnosis.png": "Where INT8 hurts: each layer's noise, and the change of accuracy with that "
    "layer alone in INT8 or alone in FP32.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    data = results["data"]
    parts = [model_table(results["models"]), describe_sizes(results)]
    fp32 = next(model for model in results["models"] if model["name"] == "fp32")
    parts += [describe_comparison(model, fp32) for model in int8_entries(results)]
    parts.append("McNemar's p: how likely chance alone makes at least such a difference.")
    if len(int8_entries(results)) > 1:
        engines = (
            f"{entry['engine']}{report.doubt(entry)} at batch {entry['batch_size']}"
            for entry in results["fastest"]
        )
        parts.append(f"Fastest: {', '.join(engines)}.")
    parts += [
        f"{model['file']} in ONNX Runtime agrees with the model that it was made from on "
        f"{report.percent(model['agreement'])} of the images."
        for model in results["models"]
        if "agreement" in model
    ]
    parts.append(describe_classes(results["per_class"]))
    if "budget" in results:
        parts += sections.tell_budget(results["budget"])
    if "diagnosis" in results:
        parts.append(sections.noisiest_layers(results["diagnosis"]))
    if "sparsity" in results:
        parts.append(sections.describe_sparsity(results["sparsity"]))
    if "coding" in results:
        parts.append(sections.describe_coding(results["coding"]))
    parts += how_to_load(results["artifacts"])
    return Story(
        f"{report.network_name(results)} in INT8",
        f"{report.describe_setting(results)} Calibrated on "
        f"{counted(data['calibration_images'], 'training image')} with the "
        f"{results['arguments']['observer']} observer.",
        _headlines(results),
        parts,
        CAPTIONS,
        report.format_cost(results),
    )


def _headlines(results: dict) -> list[tuple[str, str]]:
    fp32, int8 = results["models"][0], int8_entries(results)[0]
    comparison = int8["comparison"]
    change, interval = report.format_change(comparison["accuracy"])
    before, after = (report.megabytes(model["size_bytes"]) for model in (fp32, int8))
    return [
        (f"{1 / comparison['size_ratio']:.2f}× smaller", f"{before} to {after}"),
        (change, f"{interval}; FP32 {report.percent(fp32['accuracy']['value'])}"),
        (report.at_batch_sizes(comparison["speedup"]), "as fast as FP32 at its best"),
    ]


def label(model: dict, short: bool = False) -> str:
    """Name an entry of results.json's ``models`` for people; ``short`` for a narrow axis."""
    if model["name"] == "fp32":
        return "FP32" if short else "FP32 at its best"
    if model["name"] == "fp32-nchw":
        return "FP32 as usually written"
    if model["name"] == "int8-onnx":
        return "INT8\n.onnx" if short else "INT8 .onnx file"
    return "INT8\n" * short + model["engine"] if short else f"INT8 {model['engine']}"


def model_table(models: Sequence[dict]) -> Table:
    """Return each model's size, accuracy and speed."""
    columns = [
        Column("images/s at", label),
        Column("size", "size_bytes", report.megabytes),
        *report.accuracy_columns(),
        *report.rate_columns(models[0]["latency"]),
    ]
    note = (
        "FP32 at its best: batch norms folded, weights packed once; as usually written: the plain "
        "module. Models took turns on the same images."
    )
    if any(model["name"] == "int8-onnx" for model in models):
        note += " The .onnx file is the first INT8 model, exported, in ONNX Runtime."
    note += report.explain_doubt(models)
    return Table("", columns, models, note)


def describe_comparison(model: dict, fp32: dict) -> Facts:
    """Say what an INT8 model gains and costs; ``fp32`` is the entry of FP32 at its best."""
    comparison, accuracy = model["comparison"], model["comparison"]["accuracy"]
    over_nchw = ", ".join(
        f"{entry['value']:.2f}×{report.doubt(entry)}" for entry in model["speedup_over_nchw"]
    )
    times = ", ".join(
        f"{report.show_median(before)} to {report.show_median(after)} ms at batch "
        f"{after['batch_size']}"
        for before, after in zip(fp32["latency"], model["latency"], strict=True)
    )
    return Facts(
        f"{label(model)} against FP32 on the same images",
        {
            "size": f"{report.percent(1 - comparison['size_ratio'], 1)} smaller "
            f"({1 / comparison['size_ratio']:.2f}×); "
            + report.against_given(1 / comparison["size_ratio_given"], 2),
            "accuracy": report.describe_change(accuracy),
            "images": f"{accuracy['only_a_correct']:,} lost, {accuracy['only_b_correct']:,} gained "
            f"(McNemar p = {report.p_value(accuracy['mcnemar_p'])})",
            "time": f"{times} (medians)",
            "speed": f"{report.at_batch_sizes(comparison['speedup'])} "
            f"(against FP32 as usually written: {over_nchw})",
            "coverage": describe_coverage(model),
        },
    )


def describe_sizes(results: dict) -> str:
    """Say how large the given file is, and why INT8 may be smaller than a quarter of FP32."""
    text = report.describe_given(results)
    if results["comparison"]["size_ratio"] < INT8_SHARE:
        text += (
            " INT8 takes 8 bits for each weight where FP32 takes 32, "
            f"{report.percent(1 - INT8_SHARE, 0)} less; the rest is lossless compression."
        )
    return text


def describe_coverage(model: dict) -> str:
    """Name the operations that are left in FP32."""
    floating = [operation["name"] for operation in model["fp32_operations"]]
    total = len(model["int8_operations"]) + len(floating)
    if floating:
        return f"{len(floating)} of {total} operations in FP32: {', '.join(floating)}"
    return f"all {total} operations in INT8"


def describe_classes(rows: Sequence[dict]) -> str:
    """Name the class that changes most."""
    worst = max(rows, key=lambda row: abs(row["fp32"] - row["int8"]))
    if worst["fp32"] == worst["int8"]:
        return "By class, no accuracy changes."
    return (
        f"By class, {worst['class']} changes most: {report.percent(worst['fp32'])} to "
        f"{report.percent(worst['int8'])} ({report.points(worst['int8'] - worst['fp32'])} points)."
    )
