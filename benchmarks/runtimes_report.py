"""The rows, the table and the plot of int8_runtimes.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.runtimes import Runner
from common.measure.latency import Timing
from common.report import results as report

BEST = "torch-int8-best"
DEPLOYED, SLIM = "-deployed", "-slim"
LABELS = {
    "torch-fp32": "torch FP32 at its best",
    "onnxruntime-fp32": "ONNX Runtime FP32",
    "torch-bf16": "torch bf16, compiled",
    BEST: "ours: torch INT8, best",
    "torch-int8-pt2e": "torch PT2E, AOTInductor",
    "onnxruntime-int8-ours": "ours: ONNX in ONNX Runtime",
    "openvino-int8-ours": "ours: ONNX in OpenVINO",
    "onnxruntime-int8": "ONNX Runtime's quantizer",
    "openvino-int8": "NNCF + OpenVINO",
}


def describe(
    runners: dict[str, Runner],
    accuracies: dict[str, float],
    timings: dict[str, list[Timing]],
    macs: Mapping[str, int],
    gemm_rate: float,
) -> list[dict]:
    """Return the rows of results.json; the fastest deployed engine appears again as the best.

    Args:
        runners: By name.
        accuracies: Top-1, as fractions.
        timings: From :func:`common.measure.latency.time_interleaved`.
        macs: Multiply-accumulates an image of the ``dense`` network and, if any, the ``slim`` one.
        gemm_rate: Those a second of an INT8 GEMM.
    """
    deployed = [name for name in runners if name.endswith(DEPLOYED)]
    best = min(deployed, key=lambda name: sum(math.log(t.median_ms) for t in timings[name]))
    rows = []
    for name, source in [*((name, name) for name in runners), (BEST, best)]:
        row_macs = macs["slim" if name.endswith(SLIM) else "dense"]
        for timing in timings[source]:
            rows.append(
                {
                    "runtime": name,
                    **({"same_as": best} if name == BEST else {}),
                    **timing.as_dict(),
                    "accuracy": accuracies[source],
                    "size_bytes": runners[source].size_bytes,
                    "macs_per_image": row_macs,
                    "share_of_gemm_rate": timing.images_per_second * row_macs / gemm_rate,
                }
            )
    return rows


def label(name: str) -> str:
    """Name a runtime for people."""
    if name.endswith(DEPLOYED):
        return f"torch {name.removeprefix('torch-int8-').removesuffix(DEPLOYED)}, deployed"
    if name.endswith(SLIM):
        return f"ours: slim + {name.removeprefix('torch-int8-').removesuffix(SLIM)}"
    return LABELS.get(name, f"torch {name.removeprefix('torch-int8-')}, as converted")


def by_runtime(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Group rows by runtime, in order."""
    return {
        name: [row for row in rows if row["runtime"] == name]
        for name in dict.fromkeys(row["runtime"] for row in rows)
    }


def format_results(results: dict) -> str:
    """Lay out the table."""
    runtimes = by_runtime(results["rows"])
    sizes = [row["batch_size"] for row in next(iter(runtimes.values()))]
    header = ["images/s at batch", "size", "top-1", *map(str, sizes)]
    table = [
        [
            label(name),
            f"{rows[0]['size_bytes'] / 1e6:.1f}",
            f"{100 * rows[0]['accuracy']:.2f}",
            *(
                f"{row['images_per_second']:.0f} ({100 * row['share_of_gemm_rate']:.0f})"
                for row in rows
            ),
        ]
        for name, rows in runtimes.items()
    ]
    environment = results["environment"]
    best = runtimes[BEST][0]["same_as"]
    return (
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}; "
        f"{results['data']['test_images']:,} test images\n"
        f"size in MB, top-1 in %; in brackets % of the INT8 GEMM rate, "
        f"{results['gemm_macs_per_second'] / 1e9:.0f} GMAC/s\n\n"
        + report.format_table(header, table)
        + f"\n\nbest: {label(best)}\n"
    )


def plot(results: dict, path: Path) -> None:
    """Plot images a second by batch size: ours in colour, the others in grey."""
    everything = by_runtime(results["rows"])
    plain = "torch-int8-fbgemm"
    first = ("torch-fp32", "onnxruntime-fp32", "torch-bf16", plain)
    shown = [name for name in first if name in everything]
    shown += [name for name in LABELS if name in everything and name not in shown]
    shown += [name for name in everything if name.endswith(SLIM)]
    shades = {"torch-fp32": "#D0D0D0", "onnxruntime-fp32": "#F2CC8C",
              "torch-bf16": "#B0B0B0", plain: "#8C8C8C",
              BEST: report.BLUE, "torch-int8-pt2e": "#9B7FB8", "onnxruntime-int8-ours": "#5AA9DC",
              "openvino-int8-ours": "#A5CFEB", "onnxruntime-int8": report.ORANGE,
              "openvino-int8": report.GREEN}  # fmt: skip
    sizes = [row["batch_size"] for row in everything[shown[0]]]
    figure, axis = report.new_figure(11, 4.6)
    width = 0.84 / len(shown)
    for index, name in enumerate(shown):
        speeds = [row["images_per_second"] for row in everything[name]]
        positions = np.arange(len(sizes)) + (index - (len(shown) - 1) / 2) * width
        shade = report.RED if name.endswith(SLIM) else shades[name]
        bars = axis.bar(positions, speeds, width * 0.94, color=shade, label=label(name))
        axis.bar_label(bars, [f"{speed:.0f}" for speed in speeds], padding=2, fontsize=6.8)
    ceiling = results["gemm_macs_per_second"] / results["macs_per_image"]
    axis.axhline(ceiling, color="#444444", lw=1, ls="--")
    axis.annotate(
        f"rate of a large INT8 matrix product, dense: {ceiling:.0f}", (-0.42, ceiling),
        xytext=(0, 4), textcoords="offset points", fontsize=8.5,
    )  # fmt: skip
    axis.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    environment = results["environment"]
    axis.set(
        title=f"ResNet18 for CIFAR-10 in INT8 on {environment['cpu']}, "
        f"{environment['threads']} threads",
        ylabel="images a second",
    )
    axis.margins(x=0.01, y=0.3)
    axis.legend(loc="upper left", ncols=4, fontsize=8.5)
    report.save_figure(figure, path)
