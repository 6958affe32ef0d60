"""What pipeline.py tells: the answers, and what to ship in words."""

from collections.abc import Sequence

from common.command.cli import counted
from common.measure.latency import speedups
from common.report import results as report
from common.report.story import Column, Story, Table, how_to_load
from pipeline import GOALS

SAME_SIZE = 0.01  # a difference of the given file and FP32's, as a fraction, not worth telling
CAPTIONS = {
    "frontier.png": "Accuracy against size and speed: the answers with their 95 % intervals, and, "
    "small, what was tried on the images that choose.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    budget, confirming = results["budget"], results["models"][0]["accuracy"]["total"]
    return Story(
        f"{report.network_name(results)}, as small and as fast as a budget allows",
        f"{report.describe_setting(results)} The budget is a loss of "
        f"{counted(100 * budget['max_drop'], 'point')}, chosen on "
        f"{counted(budget['choosing_images'], 'image')}; every figure is of a file that was read "
        f"back, on the other {confirming:,}.",
        [_headline(answer, budget["max_drop"]) for answer in results["answers"]],
        [
            report.describe_given(results),
            size_table(results),
            speed_table(results),
            *advise(results),
            *how_to_load(results["artifacts"]),
        ],
        CAPTIONS,
        report.format_cost(results),
    )


def _headline(answer: dict, max_drop: float) -> tuple[str, str]:
    meaning = (
        f"{answer['name']}; as fast as FP32 at its best: "
        f"{report.at_batch_sizes(answer['speedup'], 'over_fp32')}; "
        f"{report.describe_change(answer['comparison'])}"
    )
    if not answer["within_budget"]:
        meaning += "; not within the budget"
    elif is_open(answer, max_drop):
        meaning += "; not proven to be within the budget"
    return f"{answer['size_ratio']:.1f}× smaller", meaning


def is_open(answer: dict, max_drop: float) -> bool:
    """Whether the images leave open that an answer loses more than the budget."""
    return answer["comparison"]["ci95"][1] > max_drop


def label(entry: dict, results: dict) -> str:
    """Name a row; a network that was read from a coded file is not called dense."""
    name = entry["name"]
    if name in GOALS:
        return name
    return name.upper() if results["weights"]["coded"] else f"dense {name.upper()}"


def size_of(entry: dict) -> int:
    """Return the bytes of a model's or an answer's file."""
    return entry.get("file_bytes", entry.get("size_bytes"))


def size_table(results: dict) -> Table:
    """Return bytes, ratios, accuracy and multiply-adds of every file."""
    fp32, int8 = results["models"]
    given = Column("than given", "size_ratio_given", "{:.1f}×".format)
    columns = [
        Column("", lambda entry: label(entry, results)),
        Column("MB", lambda entry: size_of(entry) / 1e6, "{:.2f}".format),
        Column("smaller", "size_ratio", "{:.1f}×".format),
        *([] if _given_fp32(results) else [given]),
        *report.accuracy_columns(),
        *report.change_columns(),
        Column("MACs", "macs_kept", lambda share: report.percent(share, 0)),
    ]
    note = (
        f"Smaller: than the file of {label(fp32, results)}. Points are "
        "against FP32 on the same images. MACs: multiply-adds that are left. INT8 with all its "
        "channels is here for comparison: quantization.py writes it."
    )
    sizes = {"size_ratio": fp32, "size_ratio_given": results["weights"]}
    ratios = {name: larger["size_bytes"] / size_of(int8) for name, larger in sizes.items()}
    dense = [fp32 | {"comparison": None, "macs_kept": 1}, int8 | ratios | {"macs_kept": 1}]
    return Table("The answers", columns, [*dense, *results["answers"]], note)


def _given_fp32(results: dict) -> bool:
    """Whether the given file is as large as FP32's, so that one comparison of sizes is enough."""
    ratio = results["weights"]["size_bytes"] / results["models"][0]["size_bytes"]
    return abs(ratio - 1) < SAME_SIZE


def speed_table(results: dict) -> Table:
    """Return every file's milliseconds and speed at each batch size."""
    fp32, *others = results["models"] + results["answers"]
    rows = [fp32]  # what the others are compared with
    for own in others:
        rows.append(own | {"as_fast": speedups(own["latency"], value=fp32["latency"])})
    columns = [Column("ms at", lambda entry: label(entry, results))]
    for index, timing in enumerate(fp32["latency"]):
        columns += [
            Column(f"batch {timing['batch_size']}", f"latency.{index}", report.show_median),
            Column("as fast", f"as_fast.{index}", lambda x: f"{x['value']:.1f}×{report.doubt(x)}"),
        ]
    note = (
        "Medians of one call on a batch; as fast: as FP32 at its best (batch norms folded, weights "
        "packed once). Models took turns." + report.explain_doubt(rows)
    )
    return Table("How fast", columns, rows, note)


def advise(results: dict) -> list[str]:
    """Say which file to ship and why, and what the images leave open."""
    answers, max_drop = results["answers"], results["budget"]["max_drop"]
    within = [answer for answer in answers if answer["within_budget"]]
    parts = [
        f"{answer['name']}: not within the budget; {answer['file']} is the nearest found."
        for answer in answers
        if not answer["within_budget"]
    ]
    if within:
        best, reason = choose_to_ship(within)
        why = f": {reason}" if len(answers) > 1 else ""
        unproven = " (not proven to be within the budget)" if is_open(best, max_drop) else ""
        smaller = f"{best['size_ratio']:.1f}× smaller than FP32"
        if not _given_fp32(results):
            smaller += f", {report.against_given(best['size_ratio_given'])}"
        parts.append(
            f"Ship {best['file']}{unproven}{why}. It is {smaller}; as fast as "
            f"{label(results['models'][1], results)}: "
            f"{report.at_batch_sizes(best['speedup'], 'over_int8')}."
        )
    parts += [
        f"{answer['name']}: on {counted(answer['accuracy']['total'], 'image')} a loss of up to "
        f"{100 * answer['comparison']['ci95'][1]:.2f} points cannot be excluded, more than the "
        "budget. More test images would tell."
        for answer in within
        if is_open(answer, max_drop)
    ]
    parts += [
        f"{answer['onnx']['file']} in ONNX Runtime: the same class on "
        f"{report.percent(answer['onnx']['agreement'])} of the images."
        for answer in answers
        if "onnx" in answer
    ]
    return parts


def choose_to_ship(within: Sequence[dict]) -> tuple[dict, str]:
    """Return the answer to ship, and why: ``both``, unless another one is smaller and better."""
    both = next((answer for answer in within if answer["name"] == "both"), within[0])
    no_worse = [a for a in within if a["comparison"]["drop"] <= both["comparison"]["drop"]]
    smallest = min(no_worse, key=size_of)
    if size_of(smallest) < size_of(both):
        return smallest, f"it is smaller than {both['file']} and loses no more"
    if len(within) == 1:
        return both, "it is the only answer within the budget"
    others = {answer["name"]: answer for answer in within if answer is not both}
    pieces = []
    if size := others.get("size"):
        more = size_of(both) / size_of(size)
        pieces.append(
            "no more bytes than the smallest answer" if more == 1
            else f"{more:.2f} times the bytes of {size['file']}"
        )  # fmt: skip
    if speed := others.get("speed"):
        now, least = (answer["latency"][-1] for answer in (both, speed))
        pieces.append(
            f"{now['median_ms'] / least['median_ms']:.2f}{report.doubt(now, least)} times the time "
            f"of {speed['file']} at batch {now['batch_size']}"
        )
    return both, f"it is small and fast at once, with {' and '.join(pieces)}"
