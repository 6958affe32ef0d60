"""What pipeline.py tells: the answers, and what to ship in words."""

from __future__ import annotations

from collections.abc import Callable

from common.report.results import (
    accuracy_columns,
    at_batch_sizes,
    change_columns,
    counted,
    describe_given,
    describe_setting,
    format_change,
    format_cost,
    network_name,
    percent,
)
from common.report.story import Column, Facts, Headline, Story, Table

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
        f"{network_name(results)}, as small and as fast as a budget allows",
        f"{describe_setting(results)} At most {counted(100 * budget['max_drop'], 'point')} lost, "
        f"chosen on {counted(budget['choosing_images'], 'image')}; every figure is of a file that "
        f"was read back, on the other {confirming:,}.",
        [_headline(answer) for answer in results["answers"]],
        [
            describe_given(results["weights"]),
            size_table(results),
            speed_table(results),
            *advise(results),
        ],
        CAPTIONS,
        format_cost(results),
    )


def _headline(answer: dict) -> Headline:
    change = format_change(answer["comparison"])
    return Headline(
        f"{answer['size_ratio']:.1f}× smaller",
        f"{LABELS[answer['name']]}; as fast as FP32 at its best: "
        f"{at_batch_sizes(answer['speedup'], 'over_fp32')}; {change.points} points, 95 % interval "
        f"{change.low} to {change.high}" + ("" if answer["within_budget"] else "; not within the "
        "budget"),
    )  # fmt: skip


def label(name: str, coded: bool) -> str:
    """Name a row; a network that was read from a coded file is not called dense."""
    return LABELS[name].removeprefix("dense ") if coded else LABELS[name]


def _label_column(results: dict, heading: str) -> Column:
    coded = results["weights"]["coded"]
    return Column(heading, lambda entry: label(entry["name"], coded))


def size_of(entry: dict) -> int:
    """Return the bytes of a model's or an answer's file."""
    return entry.get("file_bytes", entry.get("size_bytes"))


def size_table(results: dict) -> Table:
    """Return bytes, ratios, accuracy and multiply-adds of every file."""
    (fp32, int8), given = results["models"], results["weights"]["size_bytes"]
    columns = [
        _label_column(results, ""),
        Column("MB", size_of, lambda size_bytes: f"{size_bytes / 1e6:.2f}"),
        Column("smaller", lambda entry: fp32["size_bytes"] / size_of(entry), "{:.1f}×".format),
        Column("than given", lambda entry: given / size_of(entry), "{:.1f}×".format),
        *accuracy_columns(),
        *change_columns(),
        Column("MACs", lambda entry: entry.get("macs_kept", 1), lambda share: percent(share, 0)),
    ]
    note = (
        f"Smaller: than the file of {label('fp32', results['weights']['coded'])}, and than the "
        "given file. Points are against FP32 on the same images. MACs: multiply-adds that are left."
    )
    rows = [fp32 | {"comparison": None}, int8, *results["answers"]]
    return Table("The answers", columns, rows, note)


def speed_table(results: dict) -> Table:
    """Return every file's milliseconds and speed at each batch size."""
    fp32 = results["models"][0]
    columns = [_label_column(results, "ms at")]
    for index, timing in enumerate(fp32["latency"]):
        columns += [
            Column(f"batch {timing['batch_size']}", _median(index), "{:.1f}".format),
            Column("as fast", _speedup(fp32, index), "{:.1f}×".format),
        ]
    note = "Medians of one call on a batch; as fast: as FP32 at its best. Models took turns."
    return Table("How fast", columns, [*results["models"], *results["answers"]], note)


def _median(index: int) -> Callable[[dict], float]:
    return lambda entry: entry["latency"][index]["median_ms"]


def _speedup(fp32: dict, index: int) -> Callable[[dict], float]:
    return lambda entry: _median(index)(fp32) / _median(index)(entry)


def advise(results: dict) -> list[Facts | str]:
    """Say which file to ship, how to load it, and what is not within the budget."""
    answers = results["answers"]
    within = [answer for answer in answers if answer["within_budget"]]
    parts = [
        f"{LABELS[answer['name']]}: not within the budget; {answer['file']} is the nearest found."
        for answer in answers
        if not answer["within_budget"]
    ]
    if within:
        best = next((a for a in within if a["name"] == "both"), within[0])
        parts += [
            f"Ship {best['file']}: {best['size_ratio']:.1f}× smaller than FP32, "
            f"{best['size_ratio_given']:.1f}× smaller than the given file; as fast as "
            f"{label('int8', results['weights']['coded'])}: "
            f"{at_batch_sizes(best['speedup'], 'over_int8')}.",
            Facts(
                "Load it, in this repository",
                {
                    "import": "from quantization import load_int8",
                    "load": f'model = load_int8(folder / "{best["file"]}")',
                },
            ),
        ]
    parts += [
        f"{answer['onnx']['file']} in ONNX Runtime: the same class on "
        f"{percent(answer['onnx']['agreement'])} of the images."
        for answer in answers
        if "onnx" in answer
    ]
    return parts
