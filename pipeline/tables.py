"""What pipeline.py prints: the stages in one table, and the answer in words."""

from __future__ import annotations

from pathlib import Path

from common.report import format_cost, format_table, megabytes, percent, points

LABELS = {
    "dense": "dense FP32",
    "dense-int8": "dense INT8",
    "pruned": "pruned FP32",
    "pruned-recalibrated": "+ batch norm",
    "pruned-int8": "pruned INT8",
}


def label(stage: dict) -> str:
    """Name an entry of results.json's ``stages`` for people."""
    return LABELS[stage["name"]]


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out results.json's story for a terminal 80 columns wide."""
    data, environment = results["data"], results["environment"]
    threads = environment["threads"]
    return (
        f"ResNet18 on CIFAR-10: {data['test_images']:,} test images ({data['source']}), "
        f"{threads} thread{'s' * (threads != 1)}\n{environment['cpu']}\n\n"
        f"{format_table(*stage_table(results))}\n\n"
        + "".join(f"{sentence}\n" for sentence in answer(results))
        + f"\n{format_cost(results)}\nwritten to {output_dir}\n"
    )


def stage_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a stage's files in MB, its accuracy against dense, its latency."""
    batch_sizes = [entry["batch_size"] for entry in results["stages"][0]["latency"]]
    header = ["", "MB", "zlib", "packed", "×", "top-1", "points", "95 %",
              *(f"ms b{size}" for size in batch_sizes)]  # fmt: skip
    rows = []
    for stage in results["stages"]:
        comparison = stage["comparison"]
        low, high = (points(-limit) for limit in reversed(comparison["ci95"]))
        is_dense = stage is results["stages"][0]
        rows.append(
            [
                label(stage),
                *(f"{stage[key] / 1e6:.1f}" for key in SIZES),
                f"{1 / stage['size_ratio']:.1f}",
                f"{100 * stage['accuracy']['value']:.2f}",
                "" if is_dense else points(-comparison["drop"]),
                "" if is_dense else f"{low} {high}",
                *(f"{entry['median_ms']:.1f}" for entry in stage["latency"]),
            ]
        )
    return header, rows


SIZES = ("plain_bytes", "compressed_bytes", "packed_bytes")


def answer(results: dict) -> list[str]:
    """Say in sentences what the last stage is, against the first."""
    dense, last = results["stages"][0], results["stages"][-1]
    comparison = last["comparison"]
    low, high = (points(-limit) for limit in reversed(comparison["ci95"]))
    speedups = ", ".join(
        f"{before['median_ms'] / after['median_ms']:.1f}× at batch {before['batch_size']}"
        for before, after in zip(dense["latency"], last["latency"], strict=True)
    )
    return [
        f"{percent(last['sparsity'], 1)} of the weights are zero, the others INT8: "
        f"{megabytes(last['packed_bytes'])}, {1 / last['size_ratio']:.1f}× smaller",
        f"accuracy {points(-comparison['drop'])} points, 95 % interval {low} to {high}, "
        "without any training",
        f"speed {speedups}: of INT8; the zeros make nothing faster",
    ]
