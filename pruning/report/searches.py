"""What pruning.py tells of its searches: over the linear layers, and over many layers together."""

from collections.abc import Sequence
from functools import partial

from common.command.cli import counted
from common.report import results as report
from common.report.story import Column, Facts, Table

SCOPES = {"linear": "all linear layers", "conv": "all convolutions", "all": "the whole network"}


def linear_layers(linear: dict) -> str:
    """Return the words for the layers of a ``linear_search`` of results.json."""
    return "the linear layer" if len(linear["layers"]) == 1 else "the linear layers"


def tell_linear(results: dict) -> list[Table | Facts | str]:
    """Return the answer, the steps to it, how sure it is, and what it saves."""
    if "linear_search" not in results:
        return ["Linear layers: none at the end of this network, so there is no search over them."]
    linear = results["linear_search"]
    tolerated, layers = counted(100 * linear["tolerance"], "point"), linear_layers(linear)
    dense, total = linear["dense"]["value"], linear["pruned_weights"] + linear["kept_weights"]
    columns = [
        Column("step", "number"),
        Column("amount", "amount", report.floor_percent),
        Column("weights", "pruned_weights", "{:,}".format),
        *report.accuracy_columns(),
        Column("points", lambda step: step["accuracy"]["value"] - dense, report.points),
        Column("", lambda step: "within" if step["kept"] else "too much"),
    ]
    title = f"{layers.removeprefix('the ').capitalize()}: binary search within {tolerated} of dense"
    steps = [step | {"number": number} for number, step in enumerate(linear["steps"], start=1)]
    return [
        Table(title, columns, steps),
        f"Largest amount found: {report.floor_percent(linear['max_amount'])} of {layers} "
        f"({linear['pruned_weights']:,} of {total:,} weights) within {tolerated}, measured on the "
        "images that chose it.",
        describe_certainty(linear, tolerated),
        describe_savings(results),
    ]


def describe_certainty(linear: dict, tolerated: str) -> Facts:
    """Say how the answer does as a saved model, beside every other amount, and on other images."""
    confirmed = linear["confirmed"]
    facts = {
        "saved model": f"{report.percent(confirmed['accuracy']['value'])}, reloaded, on "
        f"{counted(confirmed['accuracy']['total'], 'image')}: "
        + report.describe_change(confirmed["comparison"]),
        "all amounts": f"{linear['explanation']} ({len(linear['curve']):,} amounts were tried)",
    }
    if splits := linear.get("splits"):
        facts["new images"] = (
            "an amount that one random half of the images chose in the same way was within "
            f"{tolerated} on the other half in {splits['within_tolerance']} of "
            f"{splits['splits']} tries (on average {report.points(-splits['drop']['mean'])} points)"
        )
    return Facts("How sure that is", facts)


def compare_zeros(dense: dict, sparse: dict, what: str) -> str:
    """Say that zeros make nothing faster, from two timings; ``what`` names the sparse network."""
    return (
        f"no faster: dense kernels multiply zeros too. For {counted(dense['batch_size'], 'image')} "
        f"{what} took {report.show_median(sparse, 0)} ms, the network as given "
        f"{report.show_median(dense, 0)} ms; they do the same work, so any difference is noise"
    )


def describe_savings(results: dict) -> Facts:
    """Say what pruning the linear layers saves."""
    linear, savings, artifacts = (results[n] for n in ("linear_search", "savings", "artifacts"))
    dense, sparse = savings["latency"]
    hold = "holds" if len(linear["layers"]) == 1 else "hold"
    return Facts(
        f"What that saves, where {linear_layers(linear)} {hold} "
        f"{report.percent(savings['linear_share'], 3)} of the weights",
        {
            "unpruned": f"{report.megabytes(savings['dense_bytes'])}, compressed by zlib "
            f"{report.megabytes(savings['dense_compressed_bytes'])}",
            "pruned file": f"{report.megabytes(savings['pruned_bytes'])}, compressed by zlib "
            f"{report.megabytes(savings['pruned_compressed_bytes'])}",
            "written as": artifacts.get("linear_model", artifacts["model"]),
            "speed": compare_zeros(dense, sparse, f"a copy with {sparse['name']}"),
        },
    )


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
    return [largest, curve_table(entries), describe_saved(results)]


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
