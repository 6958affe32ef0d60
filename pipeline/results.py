"""The part of results.json about the dense network, the answers and all that was tried."""

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

    The dense models and the answers are as read back, on the images that confirm. What was tried is
    as the images that choose saw it; its times are those of the same widths in plain INT8, for the
    kernels are the same.

    Args:
        builder: Builder of the candidates.
        found: The answers, and what was tried.
        measured: Result of :func:`pipeline.readback.measure_files`.
        paths: Files of the dense networks, under ``FP32`` and ``INT8``, and of the answers.
    """
    size_bytes = {name: path.stat().st_size for name, path in paths.items()}
    dense_macs = sum(builder.inputs.traced.network.macs.values())

    def describe_candidate(candidate: Candidate) -> dict:
        given_bytes = builder.inputs.weights["size_bytes"]
        return {
            "file_bytes": candidate.file_bytes,
            "size_ratio": size_bytes[FP32] / candidate.file_bytes,
            "size_ratio_given": given_bytes / candidate.file_bytes,
            "macs_kept": candidate.macs / dense_macs,
            "trained": candidate.trained,
        }

    def describe_answer(goal: str, best: Candidate) -> dict:
        drop = measured[goal]["comparison"]["drop"]
        return {
            "name": goal,
            "file": paths[goal].name,
            **describe_candidate(best),
            "within_budget": best.verdict.passes and drop <= builder.budget.max_drop,
            **measured[goal],
            "speedup": _speedups(measured, goal),
        }

    return {
        "models": [
            {"name": name, "engine": engine, "size_bytes": size_bytes[name], **measured[name]}
            for name, engine in ((FP32, None), (INT8, builder.settings.engine))
        ],
        "answers": [describe_answer(goal, best) for goal, best in found.best.items()],
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
