"""What pruning.py tells: the structure, each layer alone, the linear layers, layers together."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from common.report import results as report
from common.report.story import Column, Story, Table, how_to_load
from pruning.report.results import TIE_P
from pruning.report.searches import SCOPES, linear_layers, tell_linear, tell_search

CAPTIONS = {
    "sensitivity.png": "The change of accuracy with each layer alone pruned, in network order; "
    "whiskers are paired with dense.",
    "sensitivity_sorted.png": "The same, the most sensitive layer first.",
    "sensitivity_amounts.png": "Every layer at every amount: the steeper the curve, the more the "
    "network needs that layer's small weights.",
    "linear_search.png": "Accuracy at every amount of the linear layers, and the steps of the "
    "binary search.",
    "model_search.png": "How far the layers can go together: a line for each method, and a star "
    "where its search ended.",
}


def tell(results: dict) -> Story:
    """Tell results.json of a run."""
    parts = [
        report.describe_given(results),
        f"Dense accuracy {', '.join(report.format_accuracy(results['baseline']))}.",
        structure_table(results),
        "Parameters: {parameters:,}. Weights: {conv_weights:,} (conv) + {linear_weights:,} "
        "(linear); batch norms: {batch_norm_parameters:,}; biases of these layers: {biases:,}."
        "".format(**results["structure"]),
        *(ranking_table(results, ranking) for ranking in results["ranking"]),
        *tell_linear(results),
    ]
    if "model_search" in results:
        parts += tell_search(results)
    if "verification" in results:
        parts.append(describe_verification(results))
    return Story(
        f"{report.network_name(results)}, pruned",
        report.describe_setting(results),
        _headlines(results),
        [*parts, *how_to_load(results["artifacts"])],
        _captions(results["artifacts"]["plots"]),
        report.format_cost(results),
    )


def _captions(plots: Sequence[str]) -> dict[str, str]:
    """Return captions by file name; with several amounts each has plots of its own."""
    captions = dict(CAPTIONS)
    for name in plots:
        if found := re.fullmatch(r"sensitivity_([\d.]+)(_sorted)?\.png", name):
            kind = CAPTIONS[f"sensitivity{found[2] or ''}.png"]
            captions[name] = f"{found[1]} % pruned. {kind}"
    return captions


def write_csv_files(results: dict, file: Callable[[str], Path]) -> None:
    """Write the sensitivities and the sweep over the linear layers as CSV."""
    sensitivity_table("", results["sensitivity"]).write_csv(file("sensitivity.csv"))
    if "linear_search" in results:
        columns = [Column("amount", "0"), Column("accuracy", "1")]
        curve = Table("", columns, results["linear_search"]["curve"])
        curve.write_csv(file("linear_curve.csv"))


def _headlines(results: dict) -> list[tuple[str, str]]:
    baseline, ranking = results["baseline"], results["ranking"][-1]
    worst = _entries(results, ranking)[0]
    change, interval = report.format_change(worst["comparison"])
    accuracy, accuracy_interval = report.format_accuracy(baseline)
    amount = f"{100 * worst['amount']:g}"
    which = ", the most sensitive layer" if len(ranking["layers"]) > 1 else ""
    found = [
        (accuracy, f"dense accuracy, {accuracy_interval}"),
        (change, f"with {amount} % of {worst['layer']} pruned{which}; {interval}"),
    ]
    if linear := results.get("linear_search"):
        amount = report.floor_percent(linear["max_amount"])
        found.append((amount, f"of {linear_layers(linear)} can go"))
    if saved := results.get("model_saved"):
        meaning = f"of the weights can go ({SCOPES[saved['scope']]}): "
        meaning += report.describe_change(saved["comparison"])
        found.append((report.floor_percent(saved["sparsity"], 1), meaning))
    return found


def structure_table(results: dict) -> Table:
    """Return the layers and the totals."""
    structure = results["structure"]
    total = structure["conv_weights"] + structure["linear_weights"]
    whole = structure | {"name": "all", "shape": [], "weights": total}
    columns = [
        Column("layer", "name"),
        Column("shape", lambda layer: "×".join(map(str, layer["shape"]))),
        Column("weights", "weights", "{:,}".format),
        Column("share", lambda layer: layer["weights"] / total, report.percent),
        Column("MMAC", lambda layer: layer["macs"] / 1e6, "{:.2f}".format),
        Column("non-zero", "nonzeros", "{:,}".format),
    ]
    layers = results["layers"]
    return Table(
        f"The layers ({len(layers)}), before pruning",
        columns,
        [*layers, whole],
        "MMAC: millions of multiply-adds for one image. Non-zero: weights of the given file that "
        "are not exactly 0; a few zeros are weights too small for its precision.",
    )


def sensitivity_table(title: str, rows: Sequence[dict], note: str = "") -> Table:
    """Return what pruning a layer alone changes; ``rows`` are of results.json's ``sensitivity``."""
    columns = [
        Column("layer", "layer"),
        Column(None, "amount", name="amount"),
        Column(None, "achieved", name="achieved"),
        *report.accuracy_columns(),
        *report.change_columns(),
        Column("p", "comparison.mcnemar_p", lambda p: report.p_value(p, 1), "mcnemar_p"),
        Column("lost", "comparison.only_a_correct", name="images_lost"),
        Column("gained", "comparison.only_b_correct", name="images_gained"),
        Column("", lambda row: "≈" if row["tied_with_next"] else ""),
    ]
    return Table(title, columns, rows, note)


def _entries(results: dict, ranking: dict) -> list[dict]:
    """Return the entries of ``sensitivity`` in the order of a ranking, each with its rank."""
    entries = {e["layer"]: e for e in results["sensitivity"] if e["amount"] == ranking["amount"]}
    return [entries[ranked["layer"]] | ranked for ranked in ranking["layers"]]


def ranking_table(results: dict, ranking: dict) -> Table:
    """Return the layers by drop at the ranking's amount; ≈ ties a row with the next."""
    entries = _entries(results, ranking)
    return sensitivity_table(
        f"Each layer pruned alone by {100 * ranking['amount']:g} %",
        entries,
        "Against dense on the same images. Lost: images that only dense gets right; gained: that "
        "only the pruned network does. p: McNemar's; how likely chance alone makes such a "
        f"difference. ≈: may be tied with the next row (p > {TIE_P})." + explain_conflict(entries),
    )


def explain_conflict(entries: Sequence[dict]) -> str:
    """Explain that a row's interval and p disagree, if any do."""
    for comparison in (entry["comparison"] for entry in entries):
        low, high = comparison["ci95"]
        if (low > 0 or high < 0) != (comparison["mcnemar_p"] < TIE_P):
            return (
                f" Interval and p come from different methods: near p = {TIE_P}, one may include "
                "no change where the other excludes it."
            )
    return ""


def describe_verification(results: dict) -> str:
    """Say how brute force compares."""
    verification = results["verification"]
    text = (
        f"Verified: {verification['different']:,} of {verification['predictions']:,} predictions "
        "differ from brute force"
    )
    if "pruned_weights" in verification:
        text += (
            f", whose search prunes {verification['pruned_weights']:,} weights, ours "
            f"{results['linear_search']['pruned_weights']:,}"
        )
    if verification["speedup"] is not None:
        text += f"; brute force takes {verification['speedup']:.1f} times as long"
    return text + "."
