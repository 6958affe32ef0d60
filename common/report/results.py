"""How results look: as JSON, as text, and as columns of tables."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from common.command.cli import counted, visible
from common.report.story import Column

DOUBT = (
    "?: times varied by more than a fifth, so the figure may be far off. Figures without it can be "
    "too slow as well, if other programs ran all the time."
)


def format_cost(results: dict) -> str:
    """Say how long the run took, and what memory."""
    text = f"took {results['wall_seconds']:.0f} s"
    if results["peak_memory_bytes"] is not None:
        text += f" and at most {megabytes(results['peak_memory_bytes'], 0)} of memory"
    return text


def to_json(results: dict) -> str:
    """Format results as results.json's text, ASCII for any file name; NaN is a ValueError."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def network_name(results: Mapping[str, Any]) -> str:
    """Name the run's network for people."""
    family = results["network"]["family"]
    name = re.sub(r"^resnet(\d+)-cifar$", r"ResNet\1 (CIFAR layout)", family)
    name = re.sub(r"^resnet(\d+)-imagenet$", r"ResNet\1 (ImageNet layout)", name)
    return visible(name.removeprefix("torchvision:"))


def describe_setting(results: Mapping[str, Any]) -> str:
    """Say on which images and which machine the numbers were measured."""
    data, environment = results["data"], results["environment"]
    images = f"{counted(data['test_images'], 'test image')} ({visible(data['source'])})"
    is_cpu = environment["device"] == "cpu"
    fp32 = "" if is_cpu else f", FP32 on {environment['device_name']}"
    return f"{images}, {counted(environment['threads'], 'thread')}, {environment['cpu']}{fp32}."


def describe_given(results: Mapping[str, Any]) -> str:
    """Say how large the file is that the user handed in."""
    weights, parameters = results["weights"], results["network"]["parameters"]
    each = f"{weights['size_bytes'] / parameters:.1f} bytes for each parameter (FP32: 4, FP16: 2)"
    kind = "a coded network" if weights["coded"] else each
    return f"The given file takes {megabytes(weights['size_bytes'])}, {kind}."


def against_given(times_smaller: float, decimals: int = 1) -> str:
    """Say how many times smaller, or larger, a file is than the one that the user handed in."""
    if times_smaller < 1:
        return f"{1 / times_smaller:.{decimals}f}× as large as the given file"
    return f"{times_smaller:.{decimals}f}× smaller than the given file"


def at_batch_sizes(entries: Sequence[Mapping[str, Any]], name: str = "value") -> str:
    """Format a factor at each batch size; ``name`` is its key in the entries."""
    return ", ".join(
        f"{entry[name]:.2f}×{doubt(entry)} at batch {entry['batch_size']}" for entry in entries
    )


def doubt(*entries: Mapping[str, Any]) -> str:
    """Return a question mark where one of the timings, or ratios of timings, is noisy."""
    return "?" if any(entry["noisy"] for entry in entries) else ""


def show_rate(timing: Mapping[str, Any]) -> str:
    """Format images a second, with a question mark where they are noisy."""
    return f"{timing['images_per_second']:,.0f}{doubt(timing)}"


def show_median(timing: Mapping[str, Any], digits: int = 1) -> str:
    """Format a median in milliseconds, with a question mark where it is noisy."""
    return f"{timing['median_ms']:.{digits}f}{doubt(timing)}"


def explain_doubt(models: Sequence[Mapping[str, Any]]) -> str:
    """Return what explains the question marks at the ``latency`` of models, if there are any."""
    return f" {DOUBT}" if any(doubt(*model["latency"]) for model in models) else ""


def percent(value: float, digits: int = 2) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.{digits}f} %"


def floor_percent(value: float, digits: int = 2) -> str:
    """Format a largest fraction as a percentage, rounded down: more would be too much."""
    return f"{math.floor(100 * value * 10**digits + 1e-9) / 10**digits:.{digits}f} %"


def floor_factor(value: float) -> str:
    """Format a largest factor, rounded down."""
    return f"{math.floor(10 * value + 1e-9) / 10:,.1f}×"


def p_value(value: float, digits: int = 2) -> str:
    """Format a p-value by its leading digits; the least may be too small for a float."""
    return f"{value:.{digits}g}" if value else "<1e-300"


def points(value: float, digits: int = 2) -> str:
    """Format a difference of fractions in percentage points, with its sign."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"  # 0.0: no minus before a zero


def format_accuracy(accuracy: Mapping[str, Any]) -> tuple[str, str]:
    """Format an ``accuracy`` of results.json, and its interval."""
    low, high = map(percent, accuracy["ci95"])
    return percent(accuracy["value"]), f"95 % interval {low} to {high}"


def format_change(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """Format a ``comparison`` of results.json: the change, a loss negative, and its interval."""
    low, high = (points(-loss) for loss in reversed(comparison["ci95"]))
    return f"{points(-comparison['drop'])} points", f"95 % interval {low} to {high}"


def describe_change(comparison: Mapping[str, Any]) -> str:
    """Say how many points a ``comparison`` of results.json lost or gained."""
    return ", ".join(format_change(comparison))


def megabytes(size_bytes: float, digits: int = 2) -> str:
    """Format bytes as megabytes (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.{digits}f} MB"


def accuracy_columns() -> list[Column]:
    """Return the column of top-1 accuracies; in CSV files those of the counts behind it too."""
    return [
        Column(None, "accuracy.correct", name="correct"),
        Column(None, "accuracy.total", name="total"),
        Column("accuracy", "accuracy.value", percent),
    ]


def change_columns() -> list[Column]:
    """Return the columns of the change against dense and of its paired 95 % interval.

    They are shown in points, a loss negative; in CSV files they are drops, a loss positive.
    """

    def show_interval(ci95: Sequence[float]) -> str:
        low, high = sorted(-drop for drop in ci95)
        return f"{points(low)} … {points(high)}"

    return [
        Column("points", "comparison.drop", lambda drop: points(-drop), name="drop"),
        Column("95 % interval", "comparison.ci95", show_interval, name=""),
        Column(None, "comparison.ci95.0", name="drop_low"),
        Column(None, "comparison.ci95.1", name="drop_high"),
    ]


def rate_columns(latency: Sequence[dict]) -> list[Column]:
    """Return a column of images a second for each batch size; rows may lack ``latency``."""
    return [
        Column(f"batch {timing['batch_size']}", f"latency.{index}", show_rate)
        for index, timing in enumerate(latency)
    ]
