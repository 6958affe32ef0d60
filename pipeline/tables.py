"""What pipeline.py prints: the answers in one table, and what to ship in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.report.results import format_change, format_ending, format_table

LABELS = {
    "fp32": "dense FP32",
    "int8": "dense INT8",
    "size": "smallest",
    "speed": "fastest",
    "both": "both",
}


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out results.json's story; with two batch sizes it is less than 80 columns wide."""
    data, environment = results["data"], results["environment"]
    threads, budget = environment["threads"], results["budget"]
    confirming = results["models"][0]["accuracy"]["total"]
    return (
        f"ResNet18 on CIFAR-10: {data['test_images']:,} test images ({data['source']}), "
        f"{threads} thread{'s' * (threads != 1)}\n{environment['cpu']}\n\n"
        f"at most {100 * budget['max_drop']:g} points lost, chosen on "
        f"{data['test_images'] - confirming:,} images, measured on the other {confirming:,}:\n\n"
        f"{format_table(*answer_table(results))}\n\n"
        + "".join(f"{sentence}\n" for sentence in advice(results))
        + f"\n{format_ending(results, output_dir)}"
    )


def answer_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: bytes, ratio, accuracy against dense, milliseconds and factors."""
    fp32 = results["models"][0]
    batch_sizes = [entry["batch_size"] for entry in fp32["latency"]]
    header = ["", "MB", "×", "top-1", "points", "95 %"]
    for size in batch_sizes:
        header += [f"ms b{size}", "×"]
    given = results["weights"]
    ratio = fp32["size_bytes"] / given["size_bytes"]
    size = f"{given['size_bytes'] / 1e6:.2f}"
    rows = [["given file", size, f"{ratio:.1f}", *[""] * (len(header) - 3)]]
    for entry in [*results["models"], *results["answers"]]:
        size_bytes = entry.get("file_bytes", entry.get("size_bytes"))
        change, rough = (format_change(entry["comparison"], digits) for digits in (2, 1))
        row = [
            label(entry["name"], given["coded"]),
            f"{size_bytes / 1e6:.2f}",
            f"{fp32['size_bytes'] / size_bytes:.1f}",
            f"{100 * entry['accuracy']['value']:.2f}",
            "" if entry is fp32 else change.points,
            "" if entry is fp32 else f"{rough.low} {rough.high}",
        ]
        for dense, own in zip(fp32["latency"], entry["latency"], strict=True):
            row += [f"{own['median_ms']:.1f}", f"{dense['median_ms'] / own['median_ms']:.1f}"]
        rows.append(row)
    return header, rows


def label(name: str, coded: bool) -> str:
    """Name a row; a network that was read from a coded file is not called dense."""
    return LABELS[name].removeprefix("dense ") if coded else LABELS[name]


def advice(results: dict) -> Sequence[str]:
    """Say which file to ship, how to load it, and what is not within the budget."""
    answers = results["answers"]
    within = [answer for answer in answers if answer["within_budget"]]
    lines = [
        f"{LABELS[answer['name']]}: not within the budget; {answer['file']} is the nearest found"
        for answer in answers
        if not answer["within_budget"]
    ]
    if within:
        best = next((a for a in within if a["name"] == "both"), within[0])
        int8 = label("int8", results["weights"]["coded"])
        faster = ", ".join(
            f"{entry['over_int8']:.2f}× at batch {entry['batch_size']}" for entry in best["speedup"]
        )
        lines.append(f"ship {best['file']}: {best['size_ratio']:.1f}× smaller than FP32,")
        lines.append(f"     {best['size_ratio_given']:.1f}× smaller than the given file,")
        lines.append(f"     as fast as {int8}: {faster}")
        lines.append("load it, in this repository: from quantization import load_int8")
        lines.append(f'     model = load_int8(folder / "{best["file"]}")')
    lines += [
        f"{answer['onnx']['file']} in ONNX Runtime: the same class on "
        f"{100 * answer['onnx']['agreement']:.2f} %"
        for answer in answers
        if "onnx" in answer
    ]
    return lines
