"""What results.json says of the dense network, of the answers and of all that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.answers import Found
from pipeline.candidates import Candidate, CandidateBuilder
from pipeline.readback import FP32

INT8 = "int8"


def describe(
    builder: CandidateBuilder,
    found: Found,
    measured: Mapping[str, dict],
    paths: Mapping[str, Path],
) -> dict:
    """Return ``models``, ``answers`` and ``tried``.

    The models, dense, and the answers are as read back, on the images that confirm. What was tried
    is as it did on those of the images that choose which it was shown; its times are those of the
    same widths in plain INT8: the kernels are the same.

    Args:
        builder: That made them.
        found: The answers, and what was tried.
        measured: From :func:`pipeline.readback.measure_files`, by goal and by slim network.
        paths: Of the dense networks' files, under ``FP32`` and ``INT8``, and of the answers'.
    """
    given_bytes = builder.inputs.weights["size_bytes"]
    dense_macs = sum(builder.inputs.traced.network.macs.values())
    dense_bytes = paths[FP32].stat().st_size

    def describe_candidate(candidate: Candidate) -> dict:
        return {
            "file_bytes": candidate.file_bytes,
            "size_ratio": dense_bytes / candidate.file_bytes,
            "size_ratio_given": given_bytes / candidate.file_bytes,
            "macs_kept": candidate.macs / dense_macs,
            "trained": candidate.trained,
        }

    return {
        "models": [
            {
                "name": name,
                "engine": None if name == FP32 else builder.settings.engine,
                "size_bytes": paths[name].stat().st_size,
                **measured[name],
            }
            for name in (FP32, INT8)
        ],
        "answers": [
            {
                "name": goal,
                "file": paths[goal].name,
                **describe_candidate(best),
                "within_budget": best.verdict.passes
                and measured[goal]["comparison"]["drop"] <= builder.budget.max_drop,
                **measured[goal],
                "speedup": _speedups(measured, goal),
            }
            for goal, best in found.best.items()
        ],
        "tried": [
            {
                "goal": candidate.goal,
                **describe_candidate(candidate),
                "passes": candidate.verdict.passes,
                "images": candidate.verdict.shown,
                "comparison": candidate.verdict.comparison.as_dict(),
                "latency": measured[candidate.slim_path.stem]["latency"],
            }
            for candidate in found.tried
        ],
    }


def _speedups(measured: Mapping[str, dict], goal: str) -> list[dict]:
    """Return the ratios of median latencies: above 1 the answer is faster."""
    latencies = (measured[name]["latency"] for name in (FP32, INT8, goal))
    return [
        {
            "batch_size": answer["batch_size"],
            "over_fp32": fp32["median_ms"] / answer["median_ms"],
            "over_int8": int8["median_ms"] / answer["median_ms"],
            "noisy": fp32["noisy"] or int8["noisy"] or answer["noisy"],
        }
        for fp32, int8, answer in zip(*latencies, strict=True)
    ]
