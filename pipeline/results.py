"""What results.json says of the dense network, of the answers and of all that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.network.size import count_macs
from pipeline.answers import Answer
from pipeline.candidates import Candidate, Workshop
from pipeline.readback import FP32

INT8 = "int8"


def describe(
    workshop: Workshop,
    answers: Sequence[Answer],
    measured: Mapping[str, dict],
    paths: Mapping[str, Path],
) -> dict:
    """Return ``models``, ``answers`` and ``tried``.

    The models, dense, and the answers are as read back, on the images that confirm. What was tried
    is as it did on those of the images that choose which it was shown; its times are those of the
    same widths in plain INT8: the kernels are the same.

    Args:
        workshop: That made them.
        answers: Found.
        measured: From :func:`pipeline.readback.measure_files`, by goal and by slim network.
        paths: Of the dense networks' files, under ``FP32`` and ``INT8``, and of the answers'.
    """
    given_bytes = workshop.inputs.weights["size_bytes"]
    dense_macs, dense_bytes = count_macs(workshop.inputs.model), paths[FP32].stat().st_size

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
                "engine": None if name == FP32 else workshop.settings.engine,
                "size_bytes": paths[name].stat().st_size,
                **measured[name],
            }
            for name in (FP32, INT8)
        ],
        "answers": [
            {
                "name": answer.goal,
                "file": paths[answer.goal].name,
                **describe_candidate(answer.best),
                "within_budget": answer.best.verdict.passes
                and measured[answer.goal]["comparison"]["drop"] <= workshop.budget.max_drop,
                **measured[answer.goal],
                "speedup": _speedups(measured, answer.goal),
            }
            for answer in answers
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
            for answer in answers
            for candidate in answer.tried
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
        }
        for fp32, int8, answer in zip(*latencies, strict=True)
    ]
