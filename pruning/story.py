"""The page that pruning.py's ``--report`` writes: what it tells of a results.json."""

from __future__ import annotations

from common.html_report import Story, Table
from common.report import percent, points
from pruning.model_tables import (
    SCOPES,
    curve_table,
    explain_names,
    largest_table,
    method_name,
)
from pruning.tables import sensitivity_table

CAPTIONS = {
    "sensitivity_amounts.png": "Every layer at every amount: the steeper the curve, the more the "
    "network needs that layer's small weights.",
    "model_search.png": "How far the layers can go together: a line for each way to share the "
    "pruning out among them, random pruning as the control.",
    "linear_search.png": "Accuracy at every possible amount of the linear layer, and the steps by "
    "which the binary search found how far it can go.",
}
IN_ORDER = (
    "Accuracy with each layer alone pruned, in network order; whiskers are paired with dense."
)
SEARCH_NOTE = "Chosen on one half of the test images, measured on the other."
KERNELS_NOTE = "Dense kernels do all of the multiply-adds."
BY_DROP = "The same, the most sensitive layer first."


def tell(results: dict) -> Story:
    """Return what a run of pruning.py has to tell."""
    return Story(
        title="ResNet18 for CIFAR‑10, pruned layer by layer",
        question=_question(results),
        numbers=_numbers(results),
        findings=_findings(results),
        tables=_tables(results),
        captions=_sensitivity_captions(results) | CAPTIONS,
    )


def _question(results: dict) -> str:
    amounts = " and ".join(percent(ranking["amount"], 0) for ranking in results["ranking"])
    together = ""
    if "model_search" in results and (scope := results["model_search"][0]["scope"]) != "linear":
        together = f" and {SCOPES[scope]}"
    return (
        "Which layers can lose their weights, and how many? Asked for: each layer alone, pruned by "
        f"{amounts} (L1, unstructured), and the linear layer{together} as far as "
        f"{100 * results['arguments']['tolerance']:g} points allow, on "
        f"{results['data']['test_images']:,} test images ({results['data']['source']})."
    )


def _numbers(results: dict) -> list[tuple[str, str]]:
    baseline, linear = results["baseline"], results["linear_search"]
    ranking = results["ranking"][-1]
    amount, worst = percent(ranking["amount"], 0), ranking["layers"][0]["layer"]
    drop = next(
        entry["comparison"]["drop"]
        for entry in results["sensitivity"]
        if (entry["layer"], entry["amount"]) == (worst, ranking["amount"])
    )
    rank = ": the most sensitive layer" if len(ranking["layers"]) > 1 else ""
    numbers = [
        (percent(baseline["value"]),
         f"dense accuracy, 95 % interval {percent(baseline['ci95'][0])} to "
         f"{percent(baseline['ci95'][1])}"),
        (f"{points(-drop)} points", f"with {amount} of {worst} pruned{rank}"),
        (percent(linear["max_amount"]),
         f"of the linear layer can go: {_loss(linear['confirmed']['comparison'])}"),
    ]  # fmt: skip
    if "model_search" in results:
        saved = results["model_saved"]
        numbers.append(
            (percent(saved["sparsity"], 1),
             f"of {SCOPES[saved['scope']]} can go ({method_name(saved)}): "
             f"{_loss(saved['comparison'])}")
        )  # fmt: skip
    return numbers


def _loss(comparison: dict) -> str:
    low, high = (points(-limit) for limit in reversed(comparison["ci95"]))
    return f"{points(0.0 - comparison['drop'])} points, {low} to {high}"


def _findings(results: dict) -> list[str]:
    linear, savings = results["linear_search"], results["savings"]
    saved = savings["dense_bytes"] - savings["packed_bytes"]
    explanation = linear["explanation"]
    return [
        f"{explanation[0].upper()}{explanation[1:]}.",
        f"The linear layer holds {percent(savings['linear_share'], 3)} of the weights, so its "
        f"zeros save {saved:,} of {savings['dense_bytes']:,} bytes. They make nothing faster, for "
        "dense kernels multiply them as well.",
    ]


def _tables(results: dict) -> list[Table]:
    note = (
        "Against dense on the same images: only dense gets those lost right, only the pruned "
        "network those gained. ≈ says that chance explains the difference to the next row."
    )
    tables = [
        Table(
            f"Each layer alone, {percent(ranking['amount'], 0)} pruned",
            *sensitivity_table(results, ranking["amount"]),
            note,
        )
        for ranking in results["ranking"]
    ]
    if "model_search" in results:
        entries = results["model_search"]
        tolerance = f"{100 * results['arguments']['tolerance']:g} points"
        title = f"{SCOPES[entries[0]['scope']].capitalize()}, as far as {tolerance} allow"
        tables += [
            Table(
                title,
                *largest_table(entries),
                " ".join((SEARCH_NOTE, explain_names(entries), KERNELS_NOTE)),
            ),
            Table("Points lost at each compression", *curve_table(entries)),
        ]
    return tables


def _sensitivity_captions(results: dict) -> dict[str, str]:
    captions = {}
    for name in results["artifacts"]["plots"]:
        if name.startswith("sensitivity") and name not in CAPTIONS:
            captions[name] = BY_DROP if name.endswith("_sorted.png") else IN_ORDER
    return captions
