"""The page that pipeline.py's ``--report`` writes: what it tells of a results.json."""

from __future__ import annotations

from common.html_report import Story, Table
from common.report import megabytes, percent, points
from pipeline.tables import stage_table

EXPLANATION = (
    "Files in MB: as torch saves them, through zlib, and packed (a bit a weight and the values "
    "that are not zero, INT8 then through LZMA); × is the dense FP32 file over the packed one. "
    "Points are against dense FP32 on the same images, times medians of one call on a batch."
)


def tell(results: dict) -> Story:
    """Return what a run of the pipeline has to tell."""
    dense, last = results["stages"][0], results["stages"][-1]
    comparison, arguments = last["comparison"], results["arguments"]
    low, high = (points(-limit) for limit in reversed(comparison["ci95"]))
    fastest = dense["latency"][0]["median_ms"] / last["latency"][0]["median_ms"]
    step = ", its batch-norm statistics re-estimated" if arguments["recalibrate_bn"] else ""
    return Story(
        title="ResNet18 for CIFAR‑10, pruned and quantized",
        question="How small does the network get when it is pruned, then quantized to INT8, "
        f"without training? Asked for: {percent(arguments['sparsity'], 1)} of all weights pruned "
        f"({arguments['allocation']}){step}; INT8 with {arguments['engine']}.",
        numbers=[
            (f"{1 / last['size_ratio']:.1f}× smaller",
             f"{megabytes(dense['plain_bytes'])} to {megabytes(last['packed_bytes'])}, packed"),
            (f"{points(-comparison['drop'])} points",
             f"95 % interval {low} to {high}, on {dense['accuracy']['total']:,} images"),
            (f"{fastest:.1f}× faster",
             f"at batch {dense['latency'][0]['batch_size']}, which is INT8's doing"),
        ],
        findings=[
            f"{percent(last['sparsity'], 1)} of the weights are zero in the INT8 model. Zeros make "
            "a file smaller once they are packed; they make nothing faster, for dense kernels "
            "multiply them as well."
        ],
        tables=[Table("Stages", *stage_table(results), EXPLANATION)],
        captions={
            "pipeline.png": "Each step's share: INT8 takes a quarter of the bytes and most of the "
            "time, pruning most of the bytes that are left once its zeros are packed, and the "
            "intervals say what that costs on the same images."
        },
    )  # fmt: skip
