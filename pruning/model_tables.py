"""The search over the whole network in words and columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from common.report import format_table, megabytes, percent, points
from pruning.model_search import COMPRESSIONS

SCOPES = {"linear": "the linear layer", "conv": "all convolutions", "all": "the whole network"}


def method_name(entry: dict) -> str:
    """Return what a row is called; short, for tables of 80 columns."""
    if entry["finetune_epochs"]:  # which measures batch-norm statistics anew as well
        return f"tuned {entry['allocation']}"
    return f"{entry['allocation']} + BN" if entry["recalibrated"] else entry["allocation"]


def explain_names(entries: Sequence[dict]) -> str:
    """Explain what is short in the names of rows and columns."""
    explanation = (
        "MACs: multiply-adds that are not with a zero. BN: batch-norm statistics re-estimated on "
        "training images after pruning."
    )
    if epochs := max(entry["finetune_epochs"] for entry in entries):
        explanation += f" Tuned: trained after pruning, zeros held (epochs: {epochs})."
    return explanation


def largest_table(entries: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: each method's largest sparsity, its accuracy on held-out images."""
    rows = []
    for entry in entries:
        low, high = (points(-limit) for limit in reversed(entry["comparison"]["ci95"]))
        rows.append(
            [
                method_name(entry),
                percent(entry["max_sparsity"], 1),
                f"{1 / (1 - entry['max_sparsity']):.1f}×",
                percent(entry["accuracy"]["value"]),
                points(0.0 - entry["comparison"]["drop"]),
                f"{low} … {high}",
                "yes" if entry["within_tolerance"] else "NO",
                percent(entry["macs_kept"], 0),
            ]
        )
    return ["", "pruned", "", "accuracy", "points", "95 % interval", "within", "MACs"], rows


def curve_table(entries: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: points lost at each compression, ± half the paired 95 % interval."""
    rows = []
    for entry in entries:
        found = {point["sparsity"]: point["comparison"] for point in entry["points"]}
        cells = [_loss(found.get(1 - 1 / times)) for times in COMPRESSIONS]
        rows.append([method_name(entry), *cells])
    return ["points at", *(f"{times}×" for times in COMPRESSIONS)], rows


def _loss(comparison: dict | None) -> str:
    if comparison is None:
        return ""
    low, high = comparison["ci95"]
    return f"{points(0.0 - comparison['drop'], 1)} ±{50 * (high - low):.1f}"


def format_model_search(results: dict) -> str:
    """Lay out the whole chapter for a terminal 80 columns wide."""
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
        format_table(*largest_table(entries)),
        *textwrap.wrap(summary, 78, initial_indent="  ", subsequent_indent="  "),
        "",
        "Points lost at each compression of the weights, on "
        f"{first['points'][0]['accuracy']['total']:,} of the held-out images",
        format_table(*curve_table(entries)),
        "",
        f"Saved: {method_name(saved)} at {percent(saved['sparsity'], 1)}; reloaded and measured "
        f"again: {percent(saved['accuracy']['value'])}",
        f"  plain file   {megabytes(saved['pruned_bytes'])}, "
        f"compressed {megabytes(saved['pruned_compressed_bytes'])}",
        f"  packed file  {megabytes(saved['packed_bytes'])}, "
        f"{saved['dense_bytes'] / saved['packed_bytes']:.1f} times smaller than dense",
        f"  in theory    {percent(1 - saved['macs_kept'], 0)} of the multiply-adds are saved; "
        "dense kernels do them all:",
        f"  measured     {sparse['median_ms']:.0f} ms for {dense['batch_size']} images, "
        f"dense {dense['median_ms']:.0f} ms",
    ]
    return "\n".join(lines)
