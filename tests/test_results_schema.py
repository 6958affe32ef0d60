"""The schema of results.json is a schema, and refuses what the contract does not allow."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.check_results import SCHEMA

ACCURACY = {"correct": 9, "total": 10, "value": 0.9, "ci95": [0.6, 0.98]}
COMPARISON = {
    "drop": 0.1, "ci95": [-0.1, 0.3], "mcnemar_p": 1.0, "only_a_correct": 1, "only_b_correct": 0,
}  # fmt: skip
TIMING = {"batch_size": 1, "median_ms": 2.0, "iqr_ms": 0.1, "images_per_second": 500.0}
COMMON = {
    "schema": 1,
    "arguments": {},
    "environment": {
        "torch": "2", "python": "3", "cpu": "one", "threads": 2, "vnni": True, "device": "cpu",
    },
    "data": {"source": "bundled", "test_images": 10},
    "weights": {"source": "this run", "sha256": "0" * 64},
    "wall_seconds": 1.0,
    "artifacts": {"model": "model.pth", "plots": []},
}  # fmt: skip
MODEL = {
    "name": "fp32", "engine": None, "size_bytes": 1, "accuracy": ACCURACY, "latency": [TIMING],
}  # fmt: skip
ANSWER = {
    "name": "both", "file": "both.safetensors", "file_bytes": 1, "size_ratio": 41.2,
    "size_ratio_given": 20.6,
    "macs_kept": 0.5, "trained": False, "within_budget": True,
    "accuracy": ACCURACY, "comparison": COMPARISON, "latency": [TIMING],
    "speedup": [{"batch_size": 1, "over_fp32": 9.0, "over_int8": 1.4}],
}  # fmt: skip
TRIED = {
    "goal": "size", "file_bytes": 1, "size_ratio": 45.0, "macs_kept": 1.0, "trained": False,
    "passes": False, "images": 250, "comparison": COMPARISON,
}  # fmt: skip
EXAMPLES = {
    "pipeline": {
        "budget": {"max_drop": 0.01, "choosing_images": 1000},
        "models": [MODEL, MODEL],
        "answers": [ANSWER],
        "tried": [TRIED],
    },
    "quantization": {
        "models": [MODEL, MODEL],
        "comparison": {
            "size_ratio": 0.25, "accuracy": COMPARISON, "speedup": [{"batch_size": 1, "value": 5}],
        },
        "coding": {
            "file": "a.safetensors", "file_bytes": 1, "size_ratio": 40.0, "bits_per_weight": 0.7,
            "accuracy": ACCURACY, "comparison": COMPARISON,
        },
    },
    "int8_runtimes": {
        "rows": [{"runtime": "torch-fp32", "accuracy": 0.9, "size_bytes": 1, **TIMING}],
    },
    "compression_peers": {
        "fp32": {"size_bytes": 9, "accuracy": ACCURACY},
        "rows": [
            {"method": "NNCodec", "setting": "qp -28", "size_bytes": 1, "accuracy": ACCURACY,
             "comparison": COMPARISON},
        ],
    },
}  # fmt: skip


def results_of(script: str) -> dict:
    return json.loads(json.dumps({**COMMON, "script": script, **EXAMPLES[script]}))


def test_it_is_a_schema_of_draft_2020_12():
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    assert SCHEMA.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("script", EXAMPLES)
def test_it_takes_what_the_contract_shows(script):
    SCHEMA.validate(results_of(script))


@pytest.mark.parametrize(
    ("script", "damage", "place"),
    [
        ("quantization", lambda r: r["models"][0]["accuracy"].update(value=92.65), "value"),
        ("quantization", lambda r: r["comparison"]["accuracy"].pop("mcnemar_p"), "accuracy"),
        ("quantization", lambda r: r["models"][0].update(size_bytes=44.7), "size_bytes"),
        ("quantization", lambda r: r["coding"].update(file="a/b.safetensors"), "file"),
        ("quantization", lambda r: r.pop("comparison"), "$"),
        ("pipeline", lambda r: r["answers"][0].update(name="fast"), "name"),
        ("pipeline", lambda r: r.update(answers=[]), "answers"),
        ("int8_runtimes", lambda r: r["rows"][0].pop("runtime"), "rows"),
        ("int8_runtimes", lambda r: r["weights"].update(sha256="?"), "sha256"),
        ("int8_runtimes", lambda r: r["weights"].update(size_bytes=0), "size_bytes"),
        ("pipeline", lambda r: r["answers"][0].update(size_ratio_given=0), "size_ratio_given"),
        ("int8_runtimes", lambda r: r.update(schema=2), "schema"),
    ],
)
def test_it_refuses_what_the_contract_does_not_allow(script, damage, place):
    results = results_of(script)
    damage(results)
    (problem,) = SCHEMA.iter_errors(results)
    assert place in problem.json_path
