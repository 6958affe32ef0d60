"""What pruning.py tells of the search over the linear layers."""

from common.command.cli import counted
from common.report import results as report
from common.report.story import Column, Facts, Table


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
