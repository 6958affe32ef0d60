"""What results.json says of the dense network and of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.answers import Answer
from pipeline.readback import FP32, Measured

INT8 = "int8"


def describe_models(
    measured: Mapping[str, Measured], paths: Mapping[str, Path], engine: str
) -> list[dict]:
    """Return ``models``: the dense network in FP32 and in INT8, each as read back.

    Args:
        measured: From :func:`pipeline.readback.measure_files`.
        paths: Of the same files.
        engine: Of INT8.
    """
    return [
        {
            "name": name,
            "engine": None if name == FP32 else engine,
            "size_bytes": paths[name].stat().st_size,
            **measured[name].as_dict(),
        }
        for name in (FP32, INT8)
    ]


def describe_answers(
    answers: Sequence[Answer],
    measured: Mapping[str, Measured],
    paths: Mapping[str, Path],
    dense_macs: int,
    max_drop: float,
) -> list[dict]:
    """Return ``answers``: each as read back, on the images that confirm.

    Args:
        answers: Found.
        measured: From :func:`pipeline.readback.measure_files`, by goal.
        paths: Of the same files, the dense checkpoint's under ``FP32``.
        dense_macs: Multiply-adds of the dense network.
        max_drop: The budget.
    """
    entries = []
    for answer in answers:
        goal, path = answer.goal, paths[answer.goal]
        drop = measured[goal].comparison.drop
        entries.append(
            {
                "name": goal,
                "file": path.name,
                "file_bytes": path.stat().st_size,
                "size_ratio": paths[FP32].stat().st_size / path.stat().st_size,
                "macs_kept": answer.best.macs / dense_macs,
                "trained": answer.best.trained,
                "within_budget": answer.passes and drop <= max_drop,
                **measured[goal].as_dict(),
                "speedup": _speedups(measured, goal),
            }
        )
    return entries


def describe_tried(
    answers: Sequence[Answer], measured: Mapping[str, Measured], dense_macs: int, dense_bytes: int
) -> list[dict]:
    """Return ``tried``: every candidate, on those of the images that choose which it was shown.

    Times are those of the same widths in plain INT8: the kernels are the same.
    """
    return [
        {
            "goal": candidate.goal,
            "file_bytes": candidate.file_bytes,
            "size_ratio": dense_bytes / candidate.file_bytes,
            "macs_kept": candidate.macs / dense_macs,
            "trained": candidate.trained,
            "passes": candidate.verdict.passes,
            "images": candidate.verdict.shown,
            "comparison": candidate.verdict.comparison.as_dict(),
            "latency": [timing.as_dict() for timing in measured[candidate.slim_path.stem].timings],
        }
        for answer in answers
        for candidate in answer.tried
    ]


def _speedups(measured: Mapping[str, Measured], goal: str) -> list[dict]:
    """Return the ratios of median latencies: above 1 the answer is faster."""
    timings = (measured[name].timings for name in (FP32, INT8, goal))
    return [
        {
            "batch_size": answer.batch_size,
            "over_fp32": fp32.median_ms / answer.median_ms,
            "over_int8": int8.median_ms / answer.median_ms,
        }
        for fp32, int8, answer in zip(*timings, strict=True)
    ]
