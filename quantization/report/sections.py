"""What quantization.py tells of the accuracy budget, the diagnosis, zeros, and the coded file."""

from collections.abc import Sequence

from common.command.cli import counted
from common.report import results as report
from common.report.story import Column, Facts, Table
from quantization.coding.smallest import misses

NOISIEST_SHOWN = 5


def tell_budget(budget: dict) -> list[Table | Facts]:
    """Say what was tried to hold the accuracy budget, and whether it held."""
    columns = [
        Column("tried, on held-out training images", "action"),
        Column("points", lambda step: -step["drop"], report.points),
        Column("to spare", "spare", report.points),
        Column("kept", lambda step: "yes" if step["kept"] else "no"),
    ]
    verdict = "met" if budget["met"] else "NOT met: the best model found was written"
    facts = {
        "held-out images": f"{report.points(-budget['held_out_drop'])} points, "
        f"{report.points(budget['held_out_spare'])} to spare "
        f"({counted(budget['held_out_images'], 'image')}, "
        f"{budget['held_out_engine']})",
        "test images": f"{report.points(-budget['test_drop'])} points ({budget['test_engine']})",
    }
    note = (
        "To spare: how much more could be lost. On held-out images the loss and one standard error "
        "must be within the budget, on test images the loss."
    )
    title = f"Accuracy budget of {counted(100 * budget['max_drop'], 'point')}: {verdict}"
    return [Facts(title, facts), Table("The way to the budget", columns, budget["steps"], note)]


def diagnosis_table(rows: Sequence[dict], title: str = "", note: str = "") -> Table:
    """Return layers' noise, and what INT8 costs with each alone and without it."""
    decibels, change = "{:.1f} dB".format, lambda drop: report.points(-drop)
    columns = [
        Column("layer", "layer"),
        Column("SQNR", "sqnr_db", decibels, "sqnr_db"),
        Column("weights", "weight_sqnr_db", decibels, "weight_sqnr_db"),
        Column("activations", "activation_sqnr_db", decibels, "activation_sqnr_db"),
        Column("alone INT8", "drop_only_quantized", change, "drop_only_quantized"),
        Column("alone FP32", "drop_only_fp32", change, "drop_only_fp32"),
    ]
    return Table(title, columns, rows, note)


def noisiest_layers(rows: Sequence[dict]) -> Table:
    """Return the layers that INT8 hurts most."""
    worst = sorted(rows, key=lambda row: row["sqnr_db"])[:NOISIEST_SHOWN]
    note = (
        "SQNR: signal to quantization noise of a layer's output, and with only its weights or "
        "activations rounded. Alone: points against FP32 with only this layer in INT8, and with "
        "all but this one."
    )
    return diagnosis_table(worst, "The noisiest layers", note)


def describe_sparsity(sparsity: dict) -> str:
    """Say that the zeros of a pruned network are still there."""
    weights, before, after = (sparsity[key] for key in ("weights", "zeros_before", "zeros_after"))
    return (
        f"The network came pruned: {report.percent(before / weights)} of its weights are zero. In "
        f"INT8 every one of them still is; rounding adds {after - before:,}."
    )


def describe_coding(coding: dict) -> Facts:
    """Describe the coded file."""
    missed = misses(coding["bits_per_weight"], coding["bits_wanted"])
    asked = f" ({coding['bits_wanted']:g} asked for)" if missed else ""
    return Facts(
        f"The coded file: {coding['file']}",
        {
            "size": f"{report.megabytes(coding['file_bytes'])}, {coding['size_ratio']:.1f}× "
            f"smaller than FP32, {report.against_given(coding['size_ratio_given'])}; "
            f"{coding['bits_per_weight']:.2f} bits a weight{asked}",
            "accuracy": f"{report.percent(coding['accuracy']['value'])}, "
            + report.describe_change(coding["comparison"]),
        },
    )
