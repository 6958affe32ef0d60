"""What pruning.py tells of the search over many layers together."""

from collections.abc import Sequence
from functools import partial

from common.command.cli import counted
from common.report import results as report
from common.report.story import Column, Facts, Table
from pruning.report.linear import compare_zeros

SCOPES = {"linear": "all linear layers", "conv": "all convolutions", "all": "the whole network"}


def method_name(entry: dict) -> str:
    """Return the short name of a row, for tables of 80 columns."""
    if entry["finetune_epochs"]:  # training re-estimates batch norms as well
        return f"tuned {entry['allocation']}"
    return f"{entry['allocation']} + BN" if entry["recalibrated"] else entry["allocation"]


def fewer(sparsity: float) -> str:
    """Return how many times fewer weights there are."""
    return f"{1 / (1 - sparsity):.2g}×"


def sparsities(entries: Sequence[dict]) -> list[float]:
    """Return the sparsities at which methods were measured."""
    return [point["sparsity"] for point in entries[0]["points"]]


def tell_search(results: dict) -> list[Table | Facts]:
    """Return each method's largest sparsity, its accuracies, and what was saved."""
    entries, tolerance = results["model_search"], results["arguments"]["tolerance"]
    columns = [
        Column("", method_name),
        Column("pruned", "max_sparsity", lambda share: report.floor_percent(share, 1)),
        Column("fewer", lambda row: 1 / (1 - row["max_sparsity"]), report.floor_factor),
        *report.accuracy_columns(),
        *report.change_columns(),
        Column("within", lambda row: "yes" if row["within_tolerance"] else "NO"),
        Column("MACs", "macs_kept", lambda share: report.percent(share, 0)),
    ]
    largest = Table(
        f"{SCOPES[entries[0]['scope']].capitalize()}: the largest sparsity within "
        f"{counted(100 * tolerance, 'point')} ({results['model_search_seconds']:.0f} s)",
        columns,
        entries,
        f"Chosen on {counted(entries[0]['chosen_on_images'], 'image')} with one standard error to "
        f"spare, measured on {entries[0]['accuracy']['total']:,} others. {explain_names(entries)}",
    )
    curves = [curve_table(entries)] if sparsities(entries) else []
    return [largest, *curves, describe_saved(results)]


def explain_names(entries: Sequence[dict]) -> str:
    """Explain the short names of rows and columns."""
    explanation = "MACs: multiply-adds that are left."
    if any(entry["recalibrated"] for entry in entries):
        explanation += " BN: batch-norm statistics re-estimated on training images after pruning."
    if epochs := max(entry["finetune_epochs"] for entry in entries):
        explanation += f" Tuned: trained after pruning, zeros held ({counted(epochs, 'epoch')})."
    return explanation


def curve_table(entries: Sequence[dict]) -> Table:
    """Return the change of accuracy at each compression, ± half the paired 95 % interval."""

    def change_at(sparsity: float, entry: dict) -> str | None:
        for point in entry["points"]:
            if point["sparsity"] == sparsity:
                low, high = point["comparison"]["ci95"]
                return f"{report.points(-point['comparison']['drop'], 1)} ±{50 * (high - low):.1f}"
        return None

    columns = [Column("points at", method_name)]
    columns += [Column(fewer(at), partial(change_at, at)) for at in sparsities(entries)]
    title = (
        "Points against dense at each compression of the weights, on "
        f"{entries[0]['points'][0]['accuracy']['total']:,} of the held-out images"
    )
    return Table(title, columns, entries)


def describe_saved(results: dict) -> Facts:
    """Say what the saved model is, and what it saves."""
    saved = results["model_saved"]
    dense, sparse = saved["latency"]
    compressed = saved["pruned_compressed_bytes"]
    return Facts(
        f"Saved: {method_name(saved)} at {report.floor_percent(saved['sparsity'], 1)}; reloaded "
        "and measured again",
        {
            "accuracy": f"{report.percent(saved['accuracy']['value'])}: "
            + report.describe_change(saved["comparison"]),
            "plain file": report.megabytes(saved["pruned_bytes"]),
            "compressed": f"{report.megabytes(compressed)} by zlib: "
            f"{saved['dense_compressed_bytes'] / compressed:.1f}× smaller than dense by zlib, "
            + report.against_given(results["weights"]["size_bytes"] / compressed),
            "written as": results["artifacts"]["model"],
            "in theory": f"{report.percent(1 - saved['macs_kept'], 0)} of the multiply-adds are "
            "saved; dense kernels do them all",
            "speed": compare_zeros(dense, sparse, "the pruned network"),
        },
    )
