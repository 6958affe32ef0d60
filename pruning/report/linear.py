"""What pruning.py tells of the search over the linear layers."""

from __future__ import annotations

from common.report.results import (
    accuracy_columns,
    counted,
    doubt,
    floor_percent,
    format_change,
    megabytes,
    percent,
    points,
)
from common.report.story import Column, Facts, Table

NO_LINEAR_LAYERS = (
    "Linear layers: none at the end of this network, so there is no search over them."
)


def linear_layers(linear: dict) -> str:
    """Return the words for the layers of a ``linear_search`` of results.json."""
    return "the linear layer" if len(linear["layers"]) == 1 else "the linear layers"


def curve_table(linear: dict) -> Table:
    """Return the accuracy at every amount of the linear layers, for a CSV file."""
    columns = [
        Column("amount", lambda pair: pair[0]),
        Column("accuracy", lambda pair: pair[1]),
    ]
    return Table("", columns, linear["curve"])


def steps_table(linear: dict) -> Table:
    """Return the steps of the binary search."""
    dense = linear["dense"]["value"]
    columns = [
        Column("step", lambda step: step["number"]),
        Column("amount", lambda step: step["amount"], floor_percent),
        Column("weights", lambda step: step["pruned_weights"], "{:,}".format),
        *accuracy_columns(),
        Column("points", lambda step: step["accuracy"]["value"] - dense, points),
        Column("", lambda step: "within" if step["kept"] else "too much"),
    ]
    steps = [step | {"number": n} for n, step in enumerate(linear["steps"], start=1)]
    layers = linear_layers(linear).removeprefix("the ").capitalize()
    tolerance = counted(100 * linear["tolerance"], "point")
    return Table(f"{layers}: binary search within {tolerance} of dense", columns, steps)


def describe_answer(linear: dict) -> str:
    """Say in one line how far the linear layers can be pruned."""
    total = linear["pruned_weights"] + linear["kept_weights"]
    return (
        f"Largest amount found: {floor_percent(linear['max_amount'])} of {linear_layers(linear)} "
        f"({linear['pruned_weights']:,} of {total:,} weights) within "
        f"{counted(100 * linear['tolerance'], 'point')}."
    )


def describe_certainty(linear: dict) -> Facts:
    """Say how the answer does as a saved model, beside every other amount, and on other images."""
    confirmed = linear["confirmed"]
    change = format_change(confirmed["comparison"])
    tolerance = counted(100 * linear["tolerance"], "point")
    facts = {
        "saved model": f"{percent(confirmed['accuracy']['value'])}, reloaded, on "
        f"{counted(confirmed['accuracy']['total'], 'image')}: {change.points} points, 95 % "
        f"interval {change.low} to {change.high}",
        "all amounts": describe_largest(linear),
    }
    if "splits" in linear:
        splits = linear["splits"]
        outside = splits["splits"] - splits["within_tolerance"]
        facts["new images"] = (
            f"such an amount lost more than {tolerance} on other images {outside} times in "
            f"{splits['splits']} (on average {points(-splits['drop']['mean'])} points): each time "
            "one random half of the images chose and the other half judged"
        )
    return Facts("How sure that is", facts)


def describe_largest(linear: dict) -> str:
    """Say how the answer compares with the largest of all amounts that is within the tolerance."""
    tried = f"{len(linear['curve']):,} amounts were tried"
    if linear["exhaustive_max_amount"] == linear["max_amount"]:
        return f"no larger amount is within the tolerance; {tried}"
    return (
        f"a larger amount, {floor_percent(linear['exhaustive_max_amount'])}, is within the "
        "tolerance too, because accuracy does not fall steadily: the binary search stepped over "
        f"it ({tried})"
    )


def compare_zeros(dense: dict, sparse: dict, what: str) -> str:
    """Say that zeros make nothing faster, and how long both networks took.

    Args:
        dense: Timing of the network as given.
        sparse: Timing of the network with zeros.
        what: What the network with zeros is.
    """
    return (
        f"no faster: dense kernels multiply zeros too. For {counted(dense['batch_size'], 'image')} "
        f"{what} took {sparse['median_ms']:.0f}{doubt(sparse)} ms, the network as given "
        f"{dense['median_ms']:.0f}{doubt(dense)} ms; they do the same work, so any difference is "
        f"noise"
    )


def describe_savings(results: dict) -> Facts:
    """Say what pruning the linear layers saves."""
    linear, savings, artifacts = (results[n] for n in ("linear_search", "savings", "artifacts"))
    dense, sparse = savings["latency"]
    hold = "holds" if len(linear["layers"]) == 1 else "hold"
    return Facts(
        f"What that saves, where {linear_layers(linear)} {hold} "
        f"{percent(savings['linear_share'], 3)} of the weights",
        {
            "unpruned": f"{megabytes(savings['dense_bytes'])}, compressed by zlib "
            f"{megabytes(savings['dense_compressed_bytes'])}",
            "pruned file": f"{megabytes(savings['pruned_bytes'])}, compressed by zlib "
            f"{megabytes(savings['pruned_compressed_bytes'])}",
            "written as": artifacts.get("linear_model", artifacts["model"]),
            "speed": compare_zeros(dense, sparse, f"a copy with {sparse['name']}"),
        },
    )
