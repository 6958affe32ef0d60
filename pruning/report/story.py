"""What pruning.py tells: the structure, each layer alone, the linear layer, and layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.report.results import (
    accuracy_columns,
    change_columns,
    describe_setting,
    floor_percent,
    format_change,
    format_cost,
    megabytes,
    p_value,
    percent,
    points,
    rate_columns,
)
from common.report.story import Column, Facts, Headline, Story, Table
from pruning.channels.search import SCOPE as CHANNELS

SCOPES = {
    "linear": "the linear layer",
    "conv": "all convolutions",
    "all": "the whole network",
    CHANNELS: "whole channels",
}
CAPTIONS = {
    "sensitivity.png": "Points lost with each layer alone pruned, in network order; whiskers are "
    "paired with dense.",
    "sensitivity_sorted.png": "The same, the most sensitive layer first.",
    "sensitivity_amounts.png": "Every layer at every amount.",
    "linear_search.png": "Accuracy at every possible amount of the linear layer, and the steps of "
    "the binary search.",
    "model_search.png": "How far the layers can go together; random pruning is the control.",
    "slim.png": "Dense and slim at the smallest and the largest batch.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    parts = [structure_table(results), describe_structure(results["structure"])]
    parts += [sensitivity_table(results, ranking) for ranking in results["ranking"]]
    if "linear_search" in results:
        parts += tell_linear(results["linear_search"])
        parts.append(describe_savings(results["savings"], results["artifacts"]))
    if "model_search" in results:
        parts += tell_model_search(results)
    if "slim" in results:
        parts += tell_slim(results["slim"])
    if "verification" in results:
        parts.append(describe_verification(results["verification"], results["linear_search"]))
    return Story(
        f"{results['network']['name']}, pruned layer by layer",
        describe_setting(results),
        _headlines(results),
        parts,
        CAPTIONS,
        format_cost(results),
    )


def _headlines(results: dict) -> list[Headline]:
    baseline, ranking = results["baseline"], results["ranking"][-1]
    worst = _entries(results, ranking["amount"])[ranking["layers"][0]["layer"]]
    change = format_change(worst["comparison"])
    low, high = map(percent, baseline["ci95"])
    found = [
        Headline(percent(baseline["value"]), f"dense accuracy, 95 % interval {low} to {high}"),
        Headline(
            f"{change.points} points",
            f"with {percent(worst['amount'], 0)} of {worst['layer']} pruned, the most sensitive "
            f"layer; 95 % interval {change.low} to {change.high}",
        ),
    ]
    if "linear_search" in results:
        amount = results["linear_search"]["max_amount"]
        found.append(Headline(floor_percent(amount), "of the linear layer can go"))
    if "model_saved" in results:
        saved = results["model_saved"]
        change = format_change(saved["comparison"])
        found.append(
            Headline(
                floor_percent(saved["sparsity"], 1),
                f"of {SCOPES[saved['scope']]} can go: {change.points} points, 95 % interval "
                f"{change.low} to {change.high}",
            )
        )
    return found


def structure_table(results: dict) -> Table:
    """Return the layers and the totals."""
    structure = results["structure"]
    total = structure["conv_weights"] + structure["linear_weights"]
    whole = structure | {"name": "all", "shape": [], "weights": total}
    columns = [
        Column("layer", lambda layer: layer["name"]),
        Column("shape", lambda layer: "×".join(map(str, layer["shape"]))),
        Column("weights", lambda layer: layer["weights"], "{:,}".format),
        Column("share", lambda layer: layer["weights"] / total, percent),
        Column("MMAC", lambda layer: layer["macs"] / 1e6, "{:.2f}".format),
        Column("non-zero", lambda layer: layer["nonzeros"], "{:,}".format),
    ]
    return Table("The layers, before pruning", columns, [*results["layers"], whole])


def describe_structure(structure: Mapping[str, int]) -> str:
    """Say what the parameters are."""
    return (
        f"{structure['conv_weights']:,} conv + {structure['linear_weights']:,} linear weights + "
        f"{structure['batch_norm_parameters']:,} batch norm + {structure['biases']:,} biases = "
        f"{structure['parameters']:,} parameters"
    )


def _entries(results: dict, amount: float) -> dict[str, dict]:
    return {e["layer"]: e for e in results["sensitivity"] if e["amount"] == amount}


def sensitivity_table(results: dict, ranking: dict) -> Table:
    """Return the layers by drop at the ranking's amount; ≈ ties a row with the next."""
    entries = _entries(results, ranking["amount"])
    rows = [entries[ranked["layer"]] | ranked for ranked in ranking["layers"]]
    columns = [
        Column("layer", lambda row: row["layer"]),
        *accuracy_columns(),
        *change_columns(),
        Column("p", lambda row: row["comparison"]["mcnemar_p"], lambda p: p_value(p, 1)),
        Column("lost", lambda row: row["comparison"]["only_a_correct"]),
        Column("gained", lambda row: row["comparison"]["only_b_correct"]),
        Column("", lambda row: "≈" if row["tied_with_next"] else ""),
    ]
    return Table(
        f"Each layer pruned alone by {100 * ranking['amount']:g} %",
        columns,
        rows,
        "Against dense on the same images. Lost: images that only dense gets right. ≈: chance "
        "explains the difference to the next row.",
    )


def sensitivity_values(results: dict) -> Table:
    """Return every layer at every amount, for a CSV file."""
    columns = [
        Column("layer", lambda row: row["layer"]),
        Column("amount", lambda row: row["amount"]),
        Column("achieved", lambda row: row["achieved"]),
        *accuracy_columns(with_counts=True),
        *change_columns(),
        Column("mcnemar_p", lambda row: row["comparison"]["mcnemar_p"]),
        Column("images_lost", lambda row: row["comparison"]["only_a_correct"]),
        Column("images_gained", lambda row: row["comparison"]["only_b_correct"]),
    ]
    return Table("", columns, results["sensitivity"])


# --- the linear layers ----------------------------------------------------------------------------


def linear_curve(linear: dict) -> Table:
    """Return the accuracy at every amount of the linear layer, for a CSV file."""
    columns = [
        Column("amount", lambda pair: pair[0]),
        Column("accuracy", lambda pair: pair[1]),
    ]
    return Table("", columns, linear["curve"])


def tell_linear(linear: dict) -> list[Table | Facts]:
    """Return the steps of the binary search and what it found."""
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
    confirmed = linear["confirmed"]
    change = format_change(confirmed["comparison"])
    facts = {
        "answer": f"{floor_percent(linear['max_amount'])} of its weights can go, "
        f"{linear['kept_weights']:,} stay",
        "all amounts": f"{linear['explanation']} (true maximum "
        f"{floor_percent(linear['exhaustive_max_amount'])} of all {len(linear['curve']):,} "
        "possible amounts)",
        "confirmed": f"{percent(confirmed['accuracy']['value'])} by the saved, reloaded model on "
        f"{confirmed['accuracy']['total']:,} images: {change.points} points, 95 % interval "
        f"{change.low} to {change.high}",
    }
    if "splits" in linear:
        splits = linear["splits"]
        facts["new images"] = (
            f"chosen on random halves and judged on the others, {splits['splits']} times: on "
            f"average {points(-splits['drop']['mean'])} points, within the tolerance in "
            f"{splits['within_tolerance']} of {splits['splits']}"
        )
    title = f"Linear layer: binary search within {100 * linear['tolerance']:g} points of dense"
    return [Table(title, columns, steps), Facts("Found", facts)]


def describe_savings(savings: dict, artifacts: dict) -> Facts:
    """Say what pruning the linear layer saves."""
    dense, sparse = savings["latency"]
    return Facts(
        "What that saves: next to nothing, for the linear layer is "
        f"{percent(savings['linear_share'], 3)} of the weights",
        {
            "dense file": f"{megabytes(savings['dense_bytes'])}, compressed "
            f"{megabytes(savings['dense_compressed_bytes'])}",
            "pruned file": f"{megabytes(savings['pruned_bytes'])}, compressed "
            f"{megabytes(savings['pruned_compressed_bytes'])}",
            "written as": artifacts.get("linear_model", artifacts["model"]),
            "speed": f"a network with {sparse['name']} takes {sparse['median_ms']:.0f} ms for "
            f"{dense['batch_size']} images, dense {dense['median_ms']:.0f} ms: dense kernels "
            "multiply zeros too, so a difference is noise",
        },
    )


# --- many layers together -------------------------------------------------------------------------


def method_name(entry: dict) -> str:
    """Return what a row is called; short, for tables of 80 columns."""
    if entry["finetune_epochs"]:  # which measures batch-norm statistics anew as well
        return f"tuned {entry['allocation']}"
    return f"{entry['allocation']} + BN" if entry["recalibrated"] else entry["allocation"]


def unit_of(entries: Sequence[dict]) -> str:
    """Return what sparsity counts, in words."""
    return "multiply-adds" if entries[0]["scope"] == CHANNELS else "weights"


def fewer(sparsity: float) -> str:
    """Return how many times fewer weights, or multiply-adds, there are."""
    return f"{1 / (1 - sparsity):.2g}×"


def _explain_names(entries: Sequence[dict]) -> str:
    epochs = max(entry["finetune_epochs"] for entry in entries)
    explanation = "MACs: multiply-adds that are left."
    if any(entry["recalibrated"] for entry in entries):
        explanation += " BN: batch-norm statistics re-estimated on training images after pruning."
    if entries[0]["scope"] == CHANNELS:
        explanation += " Pruned: share of the multiply-adds."
    if epochs:
        explanation += f" Tuned: trained after pruning, zeros held ({epochs} epochs)."
    return explanation


def tell_model_search(results: dict) -> list[Table | Facts]:
    """Return each method's largest sparsity, its accuracy on held-out images, and what was saved."""
    entries, first = results["model_search"], results["model_search"][0]
    tolerance = 100 * results["arguments"]["tolerance"]
    largest = [
        Column("", method_name, name="method"),
        Column("pruned", lambda entry: entry["max_sparsity"], lambda s: floor_percent(s, 1)),
        Column("times", lambda entry: 1 / (1 - entry["max_sparsity"]), "{:.1f}×".format),
        *accuracy_columns(),
        *change_columns(),
        Column("within", lambda entry: "yes" if entry["within_tolerance"] else "NO"),
        Column("MACs", lambda entry: entry["macs_kept"], lambda share: percent(share, 0)),
    ]
    curve = [Column("points at", method_name)]
    for point in first["points"]:
        curve.append(Column(fewer(point["sparsity"]), _loss_at(point["sparsity"])))
    total = first["points"][0]["accuracy"]["total"]
    return [
        Table(
            f"{SCOPES[first['scope']].capitalize()}: the largest sparsity within {tolerance:g} "
            f"points ({results['model_search_seconds']:.0f} s)",
            largest,
            entries,
            f"Chosen on {first['chosen_on_images']:,} images with one standard error to spare, "
            f"measured on {first['accuracy']['total']:,} others. {_explain_names(entries)}",
        ),
        Table(
            f"Points lost at each compression of the {unit_of(entries)}, on {total:,} of the "
            "held-out images",
            curve,
            entries,
        ),
        _describe_saved(results),
    ]


def _loss_at(sparsity: float):
    def loss(entry: dict) -> str | None:
        for point in entry["points"]:
            if point["sparsity"] == sparsity:
                low, high = point["comparison"]["ci95"]
                change = format_change(point["comparison"], 1)
                return f"{change.points} ±{50 * (high - low):.1f}"
        return None

    return loss


def _describe_saved(results: dict) -> Facts:
    saved = results["model_saved"]
    dense, sparse = saved["latency"]
    times = saved["dense_compressed_bytes"] / saved["pruned_compressed_bytes"]
    return Facts(
        f"Saved: {method_name(saved)} at {floor_percent(saved['sparsity'], 1)}, reloaded and "
        "measured again",
        {
            "accuracy": percent(saved["accuracy"]["value"]),
            "plain file": f"{megabytes(saved['pruned_bytes'])}, compressed "
            f"{megabytes(saved['pruned_compressed_bytes'])}: {times:.1f}× smaller than dense, "
            "compressed as well",
            "written as": results["artifacts"]["model"],
            "multiply-adds": f"{percent(1 - saved['macs_kept'], 0)} could be saved"
            + ("" if saved["scope"] == CHANNELS else "; dense kernels do them all"),
            "speed": f"{sparse['median_ms']:.0f} ms for {dense['batch_size']} images, dense "
            f"{dense['median_ms']:.0f} ms",
        },
    )


def tell_slim(slim: dict) -> list[Table | str]:
    """Return how fast the slim network is beside the dense one."""
    models = slim["models"]
    columns = [
        Column("images/s at", _precision_name, name="model"),
        Column("size", lambda model: model["size_bytes"], megabytes, name="size_bytes"),
        *change_columns(),
        Column("MACs", lambda m: m["macs"] / models[0]["macs"], lambda share: percent(share, 0)),
        *rate_columns(models[0]["latency"]),
    ]
    ratios = ", ".join(
        f"{entry['over_dense']:.2f}× at batch {entry['batch_size']}" for entry in slim["speedup"]
    )
    return [
        Table(
            f"Slim and dense in turns, {models[0]['accuracy']['total']:,} held-out images",
            columns,
            models,
            "Points are against dense FP32 on the same images.",
        ),
        f"INT8, slim against dense: {ratios}.",
    ]


def _precision_name(model: dict) -> str:
    return model["name"].replace("fp32", "FP32").replace("int8", "INT8")


def describe_verification(verification: dict, linear: dict) -> str:
    """Say how brute force compares."""
    found = len(linear["curve"]) - 1 - linear["kept_weights"]
    text = (
        f"Verified: {verification['different']} of {verification['predictions']:,} predictions "
        f"differ from brute force, whose search prunes {verification['pruned_weights']:,} weights, "
        f"ours {found:,}"
    )
    if verification["speedup"] is not None:
        text += f"; brute force takes {verification['speedup']:.1f} times as long"
    return text + "."
