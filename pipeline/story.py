"""What pipeline.py tells: the answers in one table, and what to ship in words."""

from __future__ import annotations

from collections.abc import Sequence

from common.report.results import (
    accuracy_columns,
    change_columns,
    describe_setting,
    format_change,
    format_cost,
)
from common.report.story import Column, Headline, Story, Table

LABELS = {
    "fp32": "dense FP32",
    "int8": "dense INT8",
    "size": "smallest",
    "speed": "fastest",
    "both": "both",
}
CAPTIONS = {
    "frontier.png": "Accuracy against size and speed: the answers with their 95 % intervals, and, "
    "small, what was tried on the images that choose.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    budget, confirming = results["budget"], results["models"][0]["accuracy"]["total"]
    return Story(
        f"{results['network']['name']}, as small and as fast as a budget allows",
        f"{describe_setting(results)}. At most {100 * budget['max_drop']:g} points may be lost. "
        f"{budget['choosing_images']:,} of the images choose, the other {confirming:,} measure the "
        "files, read back.",
        [_headline(answer) for answer in results["answers"]],
        [answer_table(results), *advise(results)],
        CAPTIONS,
        format_cost(results),
    )


def _headline(answer: dict) -> Headline:
    change = format_change(answer["comparison"])
    first = answer["speedup"][0]
    return Headline(
        f"{answer['size_ratio']:.1f}× smaller",
        f"{LABELS[answer['name']]}: {first['over_fp32']:.1f}× faster than FP32 at its best at "
        f"batch {first['batch_size']}; {change.points} points, 95 % interval {change.low} to "
        f"{change.high}" + ("" if answer["within_budget"] else "; not within the budget"),
    )


def size_of(entry: dict) -> int:
    """Return the bytes of a model's or an answer's file."""
    return entry["file_bytes"] if "file_bytes" in entry else entry["size_bytes"]


def answer_table(results: dict) -> Table:
    """Return bytes, ratio, accuracy against dense, milliseconds and factors of every file."""
    fp32 = results["models"][0]
    columns = [
        Column("", lambda entry: LABELS[entry["name"]], name="network"),
        Column("MB", size_of, lambda size_bytes: f"{size_bytes / 1e6:.2f}", name="size_bytes"),
        Column("×", lambda entry: fp32["size_bytes"] / size_of(entry), "{:.1f}".format),
        *accuracy_columns(),
        *change_columns(digits=1),
    ]
    for index, timing in enumerate(fp32["latency"]):
        columns += [
            Column(f"ms b{timing['batch_size']}", _median(index), "{:.1f}".format),
            Column("×", _speedup(fp32, index), "{:.1f}".format),
        ]
    note = (
        "Points are against dense FP32 on the same images; ms b1: milliseconds for a batch of one; "
        "each × is a factor over dense FP32 at its best."
    )
    return Table("", columns, [*results["models"], *results["answers"]], note)


def _median(index: int):
    return lambda entry: entry["latency"][index]["median_ms"]


def _speedup(fp32: dict, index: int):
    return lambda entry: fp32["latency"][index]["median_ms"] / entry["latency"][index]["median_ms"]


def advise(results: dict) -> Sequence[str]:
    """Say which file to ship, how to load it, and what is not within the budget."""
    answers = results["answers"]
    within = [answer for answer in answers if answer["within_budget"]]
    lines = [
        f"{LABELS[answer['name']]}: not within the budget; {answer['file']} is the nearest found."
        for answer in answers
        if not answer["within_budget"]
    ]
    if within:
        best = next((a for a in within if a["name"] == "both"), within[0])
        factors = ", ".join(
            f"{entry['over_int8']:.2f}× at batch {entry['batch_size']}" for entry in best["speedup"]
        )
        lines += [
            f"Ship {best['file']}: {best['size_ratio']:.1f}× smaller than FP32; as fast as dense "
            f"INT8 {factors}.",
            "Load it: from quantization import load_int8\n"
            f'         model = load_int8(folder / "{best["file"]}")',
        ]
    lines += [
        f"{answer['onnx']['file']} in ONNX Runtime: the same class on "
        f"{100 * answer['onnx']['agreement']:.2f} % of the images."
        for answer in answers
        if "onnx" in answer
    ]
    return lines
