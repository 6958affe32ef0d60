"""Text and plot of the search over many layers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.report.results import (
    BLUE,
    GREEN,
    GREY,
    RED,
    format_change,
    format_table,
    megabytes,
    new_figure,
    percent,
    save_figure,
)
from pruning.channels.search import RECONSTRUCTED, SCOPE
from pruning.together.allocation import NORM, RANDOM, SENSITIVITY
from pruning.together.search import CONTROLS

PLOT = "model_search.png"
COLORS = {SENSITIVITY: GREEN, RANDOM: GREY, RECONSTRUCTED: BLUE, NORM: GREY}
SCOPES = {
    "linear": "all linear layers",
    "conv": "all convolutions",
    "all": "the whole network",
    SCOPE: "whole channels",
}


def linear_layers(linear: dict) -> str:
    """Return the words for the layers of a ``linear_search`` of results.json."""
    return "the linear layer" if len(linear["layers"]) == 1 else "the linear layers"


def method_name(entry: dict) -> str:
    """Return the short name of a row, for tables of 80 columns."""
    if entry["finetune_epochs"]:  # training re-estimates batch norms as well
        return f"tuned {entry['allocation']}"
    return f"{entry['allocation']} + BN" if entry["recalibrated"] else entry["allocation"]


def explain_names(entries: Sequence[dict]) -> str:
    """Explain the short names of rows and columns."""
    explanation = (
        "MACs: multiply-adds that are left. BN: batch-norm statistics re-estimated on "
        "training images after pruning."
    )
    if entries[0]["scope"] == SCOPE:
        explanation += (
            " Pruned: of the multiply-adds. Reconstructed: channels chosen and made up for on "
            "training images, blocks as wide as they need. Norm: the largest filters, for control."
        )
    if epochs := max(entry["finetune_epochs"] for entry in entries):
        explanation += f" Tuned: trained after pruning, zeros held (epochs: {epochs})."
    return explanation


def largest_table(entries: Sequence[dict]) -> str:
    """Lay out each method's largest sparsity, and its accuracy on held-out images."""
    rows = []
    for entry in entries:
        sparsity, change = entry["max_sparsity"], format_change(entry["comparison"])
        rows.append(
            [method_name(entry), percent(sparsity, 1), f"{1 / (1 - sparsity):.1f}×",
             percent(entry["accuracy"]["value"]), change.points, f"{change.low} … {change.high}",
             "yes" if entry["within_tolerance"] else "NO", percent(entry["macs_kept"], 0)]
        )  # fmt: skip
    header = ["", "pruned", "", "accuracy", "points", "95 % interval", "within", "MACs"]
    return format_table(header, rows)


def curve_table(entries: Sequence[dict]) -> str:
    """Lay out the change of accuracy at each compression, ± half the paired 95 % interval."""
    columns, rows = sparsities(entries), []
    for entry in entries:
        found = {point["sparsity"]: point["comparison"] for point in entry["points"]}
        rows.append([method_name(entry), *(_change(found.get(sparsity)) for sparsity in columns)])
    return format_table(["points at", *map(fewer, columns)], rows)


def sparsities(entries: Sequence[dict]) -> list[float]:
    """Return the sparsities at which methods were measured."""
    return [point["sparsity"] for point in entries[0]["points"]]


def unit_of(entries: Sequence[dict]) -> str:
    """Return the name of what sparsity counts."""
    return "multiply-adds" if entries[0]["scope"] == SCOPE else "weights"


def fewer(sparsity: float) -> str:
    """Return how many times fewer weights, or multiply-adds, there are."""
    return f"{1 / (1 - sparsity):.2g}×"


def _change(comparison: dict | None) -> str:
    if comparison is None:
        return ""
    low, high = comparison["ci95"]
    return f"{format_change(comparison, 1).points} ±{50 * (high - low):.1f}"


def format_model_search(results: dict) -> str:
    """Lay out the search over many layers for a terminal 80 columns wide."""
    entries, saved = results["model_search"], results["model_saved"]
    first = entries[0]
    dense, sparse = saved["latency"]
    tolerance = 100 * results["arguments"]["tolerance"]
    summary = (
        f"Chosen on {first['chosen_on_images']:,} images with one standard error to spare, "
        f"measured on {first['accuracy']['total']:,} others. {explain_names(entries)}"
    )
    lines = [
        f"{SCOPES[first['scope']].capitalize()}: the largest sparsity within {tolerance:g} points "
        f"({results['model_search_seconds']:.0f} s)",
        largest_table(entries),
        *textwrap.wrap(summary, 78, initial_indent="  ", subsequent_indent="  "),
        "",
        f"Points at each compression of the {unit_of(entries)}, on "
        f"{first['points'][0]['accuracy']['total']:,} of the held-out images",
        curve_table(entries),
        "",
        f"Saved: {method_name(saved)} at {percent(saved['sparsity'], 1)}; reloaded and measured "
        f"again: {percent(saved['accuracy']['value'])}",
        f"  plain file   {megabytes(saved['pruned_bytes'])}, "
        f"compressed {megabytes(saved['pruned_compressed_bytes'])}",
        f"  written as   {results['artifacts']['model']}",
        f"  that is      {saved['dense_compressed_bytes'] / saved['pruned_compressed_bytes']:.1f} "
        "times smaller than dense, compressed as well",
        f"  in theory    {percent(1 - saved['macs_kept'], 0)} of the multiply-adds are saved"
        + ("" if first["scope"] == SCOPE else "; dense kernels do them all:"),
        f"  measured     {sparse['median_ms']:.0f} ms for {dense['batch_size']} images, "
        f"dense {dense['median_ms']:.0f} ms",
    ]
    return "\n".join(lines)


def accuracies(dense: float, entries: Sequence[dict]) -> np.ndarray:
    """Return accuracies in percent as losses from ``dense``: values, lower and upper limits."""
    comparisons = [entry["comparison"] for entry in entries]
    losses = np.array([[c["drop"], *reversed(c["ci95"])] for c in comparisons])
    return 100 * (dense - losses.T)


def plot_model_search(entries: Sequence[dict], tolerance: float, path: Path) -> None:
    """Draw accuracy against compression: a line a method, a star where its search ended.

    Args:
        entries: The ``model_search`` rows of results.json.
        tolerance: Drop that is drawn as a limit.
        path: Path of the PNG.
    """
    figure, axes = new_figure(9.5, 4.8)
    dense = entries[0]["curve"][0][1]
    for entry in entries:
        color = RED if entry["finetune_epochs"] else COLORS[entry["allocation"]]
        style = "--" if entry["recalibrated"] else "-"
        times = [1 / (1 - point["sparsity"]) for point in entry["points"]]
        value, low, high = accuracies(dense, entry["points"])
        line = ([1.0, *times], [100 * dense, *value])
        axes.plot(*line, style, color=color, lw=1.6, label=method_name(entry))
        whiskers = np.clip([value - low, high - value], 0, None)
        axes.errorbar(times, value, whiskers, fmt=".", ms=4, color=color, capsize=2, lw=1)
        if entry["max_sparsity"] > 0 and entry["allocation"] not in CONTROLS:
            found = 1 / (1 - entry["max_sparsity"])
            y = 100 * (dense - entry["comparison"]["drop"])
            face = "white" if entry["recalibrated"] else color
            axes.plot(found, y, "*", ms=12, color=color, mfc=face, zorder=4)
    axes.axhline(100 * dense, color="black", lw=1)
    axes.axhline(100 * (dense - tolerance), color="black", ls=":", lw=1.2)
    axes.set_xscale("log", base=2)
    marks = sparsities(entries)
    ticks = [1, *(1 / (1 - sparsity) for sparsity in marks)]
    axes.set_xticks(ticks, ["dense", *(fewer(sparsity) for sparsity in marks)])
    axes.minorticks_off()
    unit = unit_of(entries)
    axes.set_xlabel(f"compression: {unit} before / {unit} after")
    axes.set_ylabel("top-1 accuracy (%), held-out images")
    best = max(entry["max_sparsity"] for entry in entries if entry["allocation"] not in CONTROLS)
    axes.set_title(
        f"{100 * best:.1f} % of the {unit} can go within {100 * tolerance:g} points "
        "(star: where each search ended)"
    )
    axes.legend(loc="lower left")
    save_figure(figure, path)
