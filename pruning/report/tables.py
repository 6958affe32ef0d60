"""The text that the console prints, and the CSV files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from common.report.results import (
    format_change,
    format_ending,
    format_given,
    format_table,
    megabytes,
    p_value,
    percent,
    points,
    write_csv,
)
from pruning.channels.report import format_slim
from pruning.report.together import format_model_search, linear_layers

NO_LINEAR_LAYERS = "Linear layers: none at the end of this network, so there is no search over them"


def structure_table(results: dict) -> str:
    """Lay out every layer and the totals."""
    structure = results["structure"]
    total = structure["conv_weights"] + structure["linear_weights"]
    whole = structure | {"name": "all", "shape": [], "weights": total}
    rows = [
        [layer["name"], "×".join(map(str, layer["shape"])), f"{layer['weights']:,}",
         percent(layer["weights"] / total), f"{layer['macs'] / 1e6:.2f}",
         f"{layer['nonzeros']:,}"]
        for layer in (*results["layers"], whole)
    ]  # fmt: skip
    header = ["layer", "shape", "weights", "share", "MMAC", "non-zero"]
    return "\n".join(
        [
            format_table(header, rows),
            f"{structure['conv_weights']:,} conv + {structure['linear_weights']:,} linear weights "
            f"+ {structure['batch_norm_parameters']:,} batch norm",
            f"+ {structure['biases']:,} biases = {structure['parameters']:,} parameters",
        ]
    )


def sensitivity_table(results: dict, ranking: dict) -> str:
    """Lay out the layers by drop at the ranking's amount; ≈ ties a row with the next."""
    amount, rows = ranking["amount"], []
    entries = {e["layer"]: e for e in results["sensitivity"] if e["amount"] == amount}
    for ranked in ranking["layers"]:
        entry = entries[ranked["layer"]]
        comparison = entry["comparison"]
        change = format_change(comparison)
        rows.append(
            [ranked["layer"], percent(entry["accuracy"]["value"]), change.points,
             f"{change.low} … {change.high}", p_value(comparison["mcnemar_p"], 1),
             str(comparison["only_a_correct"]), str(comparison["only_b_correct"]),
             "≈" if ranked["tied_with_next"] else ""]
        )  # fmt: skip
    header = ["layer", "accuracy", "points", "95 % interval", "p", "lost", "gained", ""]
    return format_table(header, rows)


def search_table(linear: dict) -> str:
    """Lay out the steps of the binary search."""
    rows = [
        [str(number), percent(step["amount"]), f"{step['pruned_weights']:,}",
         percent(step["accuracy"]["value"]),
         points(step["accuracy"]["value"] - linear["dense"]["value"]),
         "within" if step["kept"] else "too much"]
        for number, step in enumerate(linear["steps"], start=1)
    ]  # fmt: skip
    return format_table(["step", "amount", "weights", "accuracy", "points", ""], rows)


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out the results for a terminal 80 columns wide."""
    environment, baseline = results["environment"], results["baseline"]
    lines = [
        f"{len(results['layers'])} layers, {baseline['total']:,} test images "
        f"({results['data']['source']}), {environment['device_name']}",
        f"dense accuracy {percent(baseline['value'])}, 95 % interval "
        f"{percent(baseline['ci95'][0])} to {percent(baseline['ci95'][1])}",
        "",
        structure_table(results),
    ]
    for ranking in results["ranking"]:
        lines += [
            "",
            f"Each layer pruned alone by {100 * ranking['amount']:g} % "
            "(≈: chance explains the difference to the next)",
            sensitivity_table(results, ranking),
        ]
    if "linear_search" in results:
        lines += ["", *_search_lines(results), "", *_saving_lines(results)]
    else:
        lines += ["", NO_LINEAR_LAYERS]
    if "model_search" in results:
        lines += ["", format_model_search(results)]
    if "slim" in results:
        lines += ["", format_slim(results["slim"])]
    if "verification" in results:
        lines += ["", *_verification_lines(results)]
    lines += ["", format_ending(results, output_dir)]
    return "\n".join(lines)


def _search_lines(results: dict) -> list[str]:
    linear = results["linear_search"]
    confirmed = linear["confirmed"]
    change = format_change(confirmed["comparison"])
    lines = [
        f"{linear_layers(linear).removeprefix('the ').capitalize()}: binary search within "
        f"{100 * linear['tolerance']:g} points of dense",
        search_table(linear),
        f"  found      {percent(linear['max_amount'])} pruned, "
        f"{linear['kept_weights']:,} weights kept",
        f"  true max   {percent(linear['exhaustive_max_amount'])}, of all "
        f"{len(linear['curve']):,} possible amounts",
        *textwrap.wrap(
            linear["explanation"], 78, initial_indent=" " * 13, subsequent_indent=" " * 13
        ),
        f"  confirmed  {percent(confirmed['accuracy']['value'])} by the saved, reloaded model on "
        f"{confirmed['accuracy']['total']:,} images:",
        f"             {change.points} points, 95 % interval {change.low} to {change.high}",
    ]
    if "splits" in linear:
        splits = linear["splits"]
        lines += [
            f"  elsewhere  chosen on random halves, judged on the others {splits['splits']} times: "
            "on",
            f"             average {points(-splits['drop']['mean'])} points, within the "
            f"tolerance in {splits['within_tolerance']} of {splits['splits']}",
        ]
    return lines


def _saving_lines(results: dict) -> list[str]:
    savings, artifacts = results["savings"], results["artifacts"]
    dense, sparse = savings["latency"]
    return [
        f"What that saves, where {linear_layers(results['linear_search'])} hold"
        f"{'s' * (len(results['linear_search']['layers']) == 1)} "
        f"{percent(savings['linear_share'], 3)} of the weights",
        f"  {format_given(results['weights'])}",
        f"  unpruned     {megabytes(savings['dense_bytes'])}, "
        f"compressed {megabytes(savings['dense_compressed_bytes'])}",
        f"  pruned file  {megabytes(savings['pruned_bytes'])}, "
        f"compressed {megabytes(savings['pruned_compressed_bytes'])}",
        f"  written as   {artifacts.get('linear_model', artifacts['model'])}",
        f"  speed        {sparse['name']}: {sparse['median_ms']:.0f} ms for "
        f"{dense['batch_size']} images, dense {dense['median_ms']:.0f} ms",
    ]


def _verification_lines(results: dict) -> list[str]:
    verification = results["verification"]
    lines = [
        f"verified: {verification['different']} of {verification['predictions']:,} predictions "
        "differ from brute force,",
    ]
    if "pruned_weights" in verification:
        lines.append(
            f"          whose search prunes {verification['pruned_weights']:,} weights, ours "
            f"{results['linear_search']['pruned_weights']:,}"
        )
    if verification["speedup"] is not None:
        lines.append(f"          and which takes {verification['speedup']:.1f} times as long")
    return lines


def write_csv_files(results: dict, file: Callable[[str], Path]) -> None:
    """Write the sensitivities and the sweep over the linear layers as CSV."""
    rows = []
    for entry in results["sensitivity"]:
        accuracy, comparison = entry["accuracy"], entry["comparison"]
        rows.append(
            {
                "layer": entry["layer"],
                "amount": entry["amount"],
                "achieved": entry["achieved"],
                "correct": accuracy["correct"],
                "total": accuracy["total"],
                "accuracy": accuracy["value"],
                "drop": comparison["drop"],
                "drop_low": comparison["ci95"][0],
                "drop_high": comparison["ci95"][1],
                "mcnemar_p": comparison["mcnemar_p"],
                "images_lost": comparison["only_a_correct"],
                "images_gained": comparison["only_b_correct"],
            }
        )
    write_csv(file("sensitivity.csv"), rows)
    if "linear_search" in results:
        curve = results["linear_search"]["curve"]
        sweep = [{"amount": amount, "accuracy": value} for amount, value in curve]
        write_csv(file("linear_curve.csv"), sweep)
