"""What pruning.py tells of the search over the linear layers."""

from __future__ import annotations

from common.report.results import (
    accuracy_columns,
    counted,
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
        Column("amount", lambda step: step["amount"], percent),
        Column("weights", lambda step: step["pruned_weights"], "{:,}".format),
        *accuracy_columns(),
        Column("points", lambda step: step["accuracy"]["value"] - dense, points),
        Column("", lambda step: "within" if step["kept"] else "too much"),
    ]
    steps = [step | {"number": n} for n, step in enumerate(linear["steps"], start=1)]
    layers = linear_layers(linear).removeprefix("the ").capitalize()
    tolerance = counted(100 * linear["tolerance"], "point")
    return Table(f"{layers}: binary search within {tolerance} of dense", columns, steps)


def describe_found(linear: dict) -> Facts:
    """Say what the binary search found, and how it compares with every amount."""
    confirmed = linear["confirmed"]
    change = format_change(confirmed["comparison"])
    facts = {
        "found": f"{floor_percent(linear['max_amount'])} pruned, "
        f"{counted(linear['kept_weights'], 'weight')} kept",
        "true max": f"{floor_percent(linear['exhaustive_max_amount'])}, of all "
        f"{len(linear['curve']):,} possible amounts",
        "that is": linear["explanation"],
        "confirmed": f"{percent(confirmed['accuracy']['value'])} by the saved, reloaded model on "
        f"{counted(confirmed['accuracy']['total'], 'image')}: {change.points} points, 95 % "
        f"interval {change.low} to {change.high}",
    }
    if "splits" in linear:
        splits = linear["splits"]
        facts["elsewhere"] = (
            f"chosen on random halves, judged on the others, {counted(splits['splits'], 'time')}: "
            f"on average {points(-splits['drop']['mean'])} points, within the tolerance in "
            f"{splits['within_tolerance']} of {splits['splits']}"
        )
    return Facts("What the search found", facts)


def describe_savings(results: dict) -> Facts:
    """Say what pruning the linear layers saves."""
    linear, savings, artifacts = (results[n] for n in ("linear_search", "savings", "artifacts"))
    dense, sparse = savings["latency"]
    hold = "holds" if len(linear["layers"]) == 1 else "hold"
    return Facts(
        f"What that saves, where {linear_layers(linear)} {hold} "
        f"{percent(savings['linear_share'], 3)} of the weights",
        {
            "unpruned": f"{megabytes(savings['dense_bytes'])}, compressed "
            f"{megabytes(savings['dense_compressed_bytes'])}",
            "pruned file": f"{megabytes(savings['pruned_bytes'])}, compressed "
            f"{megabytes(savings['pruned_compressed_bytes'])}",
            "written as": artifacts.get("linear_model", artifacts["model"]),
            "speed": f"{sparse['name']}: {sparse['median_ms']:.0f} ms for "
            f"{counted(dense['batch_size'], 'image')}, dense {dense['median_ms']:.0f} ms",
        },
    )
