"""Files measured by a process that made none of them, and what results.json says of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from common.images.data import ImageSet
from common.measure.evaluate import Paired, predict
from common.measure.latency import Contender, speedups, time_interleaved
from common.network.execution import Network
from pipeline.answers import Found
from pipeline.candidates import Candidate, CandidateBuilder
from quantization.files.artifact import load_int8
from quantization.int8.engines import fp32_runner

FP32, INT8 = "fp32", "int8"


def measure_files(
    fp32: Network,
    int8: dict[str, Path],
    only_timed: dict[str, Path],
    images: ImageSet,
    batch_size: int,
    timed: Sequence[int],
    seconds: float,
) -> dict[str, dict]:
    """Read INT8 files; evaluate one after the other, then time all in turns.

    ``fp32`` is the dense network, which the others are compared with. ``batch_size`` is that of
    the evaluation; each batch size in ``timed`` is timed for some ``seconds``.

    Returns:
        ``accuracy``, ``comparison`` and ``latency`` of results.json by name, the dense network's
        under ``FP32``; only ``latency`` where a file is only timed.

    Raises:
        UserError: A file is not what was written.
    """
    readers = {FP32: partial(fp32_runner, fp32)}
    readers |= {name: partial(load_int8, path) for name, path in (int8 | only_timed).items()}
    correct = {  # a network at a time: none is held while another is evaluated
        name: predict(readers[name](), images, batch_size, f"read back {name}") == images.labels
        for name in (FP32, *int8)
    }
    contenders = [Contender(name, read()) for name, read in readers.items()]
    pixels = images.normalize(images.images[: max(timed)])
    timings = time_interleaved(contenders, pixels, timed, seconds)
    measured = {
        name: {"latency": [timing.as_dict() for timing in own]} for name, own in timings.items()
    }
    for name, own in correct.items():
        measured[name] |= Paired.of(correct[FP32], own).as_dict()
    return measured


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
        measured: Result of :func:`measure_files`.
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
        drop, latency = measured[goal]["comparison"]["drop"], measured[goal]["latency"]
        return {
            "name": goal,
            "file": paths[goal].name,
            **describe_candidate(best),
            "within_budget": best.verdict.passes and drop <= builder.budget.max_drop,
            **measured[goal],
            "speedup": speedups(
                latency, over_fp32=measured[FP32]["latency"], over_int8=measured[INT8]["latency"]
            ),
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
