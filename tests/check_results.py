"""Check results.json files against their contract: python tests/check_results.py FILE...

The contract is docs/results.schema.json; here is checked what a schema cannot say: that intervals
hold their values, that counts add up, and that the files are there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema

SCHEMA_FILE = Path(__file__).resolve().parents[1] / "docs" / "results.schema.json"
SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def check_results(results: dict, folder: Path) -> None:
    """Raise AssertionError where ``results`` breaks the contract.

    Args:
        results: The parsed results.json.
        folder: Where it lies, with the artefacts that it names.
    """
    problems = [f"{e.json_path}: {e.message}" for e in SCHEMA.iter_errors(results)]
    assert not problems, problems
    assert results["peak_memory_bytes"] is None or results["peak_memory_bytes"] > 50e6
    if results["weights"]["source"] == "the bundled weights":
        check_full_size(results)
    artifacts = results["artifacts"]
    reports = [artifacts["report"]] if "report" in artifacts else []
    for name in [artifacts["model"], *artifacts["plots"], *reports]:
        assert (folder / name).stat().st_size > 0, name
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written - {"results.json"} == names_in(artifacts)
    checks = {
        "quantization": check_quantization,
        "pruning": check_pruning,
        "training": check_training,
        "pipeline": check_pipeline,
    }
    checks[results["script"]](results, folder)


def check_full_size(results: dict) -> None:
    """Check what is known of the bundled network."""
    if results["script"] == "quantization":
        assert all(model["size_bytes"] > 1_000_000 for model in results["models"])
        assert 0.2 < results["comparison"]["size_ratio"] < 0.3
    if results["script"] == "pruning":
        assert sum(layer["weights"] for layer in results["layers"]) == 11_164_352


def without_times(results: object) -> object:
    """Drop what differs between two runs of one thing: times, memory, how and where they ran."""
    varying = {
        "latency", "speedup", "speedup_over_nchw", "wall_seconds", "peak_memory_bytes", "seconds",
        "brute_force_seconds", "noisy", "made",
        "output_dir", "resume", "json", "quiet", "overwrite",
    }  # fmt: skip
    if isinstance(results, dict):
        return {name: without_times(v) for name, v in results.items() if name not in varying}
    return [without_times(v) for v in results] if isinstance(results, list) else results


def names_in(artifacts: object) -> set[str]:
    """Return the file names listed under ``artifacts``, however nested."""
    if isinstance(artifacts, dict):
        artifacts = list(artifacts.values())
    if isinstance(artifacts, list):
        return set().union(*map(names_in, artifacts))
    return {artifacts}


def check_quantization(results: dict, folder: Path) -> None:
    """Check quantization.py's own part."""
    total = results["data"]["test_images"]
    for model in results["models"]:
        check_accuracy(model["accuracy"], total)
        for entry in model["latency"]:
            assert entry["median_ms"] > 0
            assert entry["iqr_ms"] >= 0
            speed = 1000 * entry["batch_size"] / entry["median_ms"]
            assert abs(entry["images_per_second"] / speed - 1) < 1e-9
    assert {"fp32", "int8"} <= {model["name"] for model in results["models"]}
    comparison = results["comparison"]
    sizes = {model["name"]: model["size_bytes"] for model in reversed(results["models"])}
    given = results["weights"]["size_bytes"]
    assert comparison["size_ratio"] == sizes["int8"] / sizes["fp32"]
    assert comparison["size_ratio_given"] == sizes["int8"] / given
    check_comparison(comparison["accuracy"], total)
    if "sparsity" in results:
        sparsity = results["sparsity"]
        assert 0 < sparsity["zeros_before"] <= sparsity["zeros_after"] < sparsity["weights"]
    if "coding" in results:
        coding = results["coding"]
        assert (folder / coding["file"]).stat().st_size == coding["file_bytes"]
        assert coding["size_ratio"] == results["models"][0]["size_bytes"] / coding["file_bytes"]
        assert coding["size_ratio_given"] == given / coding["file_bytes"]
        check_accuracy(coding["accuracy"], total)
        check_comparison(coding["comparison"], total)
    sizes = [entry["batch_size"] for entry in results["models"][0]["latency"]]
    assert [entry["batch_size"] for entry in comparison["speedup"]] == sizes


def check_pruning(results: dict, folder: Path) -> None:
    """Check pruning.py's own part."""
    total = results["data"]["test_images"]
    check_accuracy(results["baseline"], total)
    assert results["layers"]
    structure = results["structure"]
    weights = structure["conv_weights"] + structure["linear_weights"]
    assert sum(layer["weights"] for layer in results["layers"]) == weights
    counts = {layer["name"]: layer["weights"] for layer in results["layers"]}
    for entry in results["sensitivity"]:
        check_accuracy(entry["accuracy"], total)
        check_comparison(entry["comparison"], total)
        rounding = 0.5 / counts[entry["layer"]]
        assert abs(entry["achieved"] - entry["amount"]) <= max(1e-3, rounding)
        lost = results["baseline"]["correct"] - entry["accuracy"]["correct"]
        assert abs(entry["comparison"]["drop"] - lost / total) < 1e-12
    if search := results.get("linear_search"):
        assert search["steps"]
        assert 0 <= search["max_amount"] <= search["exhaustive_max_amount"] <= 1
        assert search["curve"]
        assert isinstance(search["monotone"], bool)
        weights = sum(counts[name] for name in search["layers"])
        assert search["pruned_weights"] + search["kept_weights"] == weights
        assert search["max_amount"] == search["pruned_weights"] / weights
    for entry in results.get("model_search", []):
        check_model_search(entry)
    if "model_search" in results:
        saved = results["model_saved"]
        assert saved["sparsity"] in [entry["max_sparsity"] for entry in results["model_search"]]
        check_accuracy(saved["accuracy"], saved["accuracy"]["total"])
        assert saved["pruned_compressed_bytes"] <= saved["dense_compressed_bytes"]


def check_model_search(entry: dict) -> None:
    """Check one row of the search over many layers."""
    total = entry["accuracy"]["total"]
    check_accuracy(entry["accuracy"], total)
    check_comparison(entry["comparison"], total)
    assert entry["scope"] in ("linear", "conv", "all")
    assert entry["allocation"] == "sensitivity"
    assert isinstance(entry["recalibrated"], bool)
    assert 0 <= entry["max_sparsity"] < 1
    assert [entry["max_sparsity"], entry["accuracy"]["value"]] in entry["curve"]
    assert entry["curve"] == sorted(entry["curve"])
    for point in entry["points"]:
        check_accuracy(point["accuracy"], point["accuracy"]["total"])
        check_comparison(point["comparison"], point["accuracy"]["total"])
        assert point["accuracy"]["total"] <= total
        assert [point["sparsity"], point["accuracy"]["value"]] in entry["curve"]
    assert entry["layers"]
    assert 0 < entry["macs_kept"] <= 1


def check_training(results: dict, folder: Path) -> None:
    """Check training.py's own part."""
    data = results["data"]
    check_accuracy(results["accuracy"], data["test_images"])
    check_accuracy(results["held_out"], data["held_out_images"])
    by_class = results["per_class"].values()
    assert sum(entry["correct"] for entry in by_class) == results["accuracy"]["correct"]
    assert results["recipe"]["epochs"] > 0
    assert results["parameters"] > 0


def check_pipeline(results: dict, folder: Path) -> None:
    """Check pipeline.py's own part."""
    fp32, int8 = results["models"]
    total = fp32["accuracy"]["total"]
    assert total + results["budget"]["choosing_images"] == results["data"]["test_images"]
    assert [answer["name"] for answer in results["answers"]] == [
        goal for goal in ("size", "speed", "both") if goal in results["arguments"]["goals"]
    ]
    for entry in (fp32, int8, *results["answers"]):
        check_accuracy(entry["accuracy"], total)
        check_comparison(entry["comparison"], total)
        lost = fp32["accuracy"]["correct"] - entry["accuracy"]["correct"]
        assert abs(entry["comparison"]["drop"] - lost / total) < 1e-12
    for answer in results["answers"]:
        assert answer["file_bytes"] == (folder / answer["file"]).stat().st_size
        assert answer["size_ratio"] == fp32["size_bytes"] / answer["file_bytes"]
        assert answer["size_ratio_given"] == results["weights"]["size_bytes"] / answer["file_bytes"]
        for speedup, *timings in zip(
            answer["speedup"], fp32["latency"], int8["latency"], answer["latency"], strict=True
        ):
            over = [t["median_ms"] / timings[-1]["median_ms"] for t in timings[:-1]]
            assert [speedup["over_fp32"], speedup["over_int8"]] == over
        if answer["within_budget"]:
            assert answer["comparison"]["drop"] <= results["budget"]["max_drop"]
    assert {tried["goal"] for tried in results["tried"]} >= {a["name"] for a in results["answers"]}


def check_accuracy(accuracy: dict, total: int) -> None:
    """Check an ``accuracy`` object of ``total`` images."""
    low, high = accuracy["ci95"]
    assert accuracy["total"] == total
    assert accuracy["value"] == accuracy["correct"] / total
    assert 0 <= low <= accuracy["value"] <= high <= 1


def check_comparison(comparison: dict, total: int) -> None:
    """Check a ``comparison`` object of ``total`` images."""
    low, high = comparison["ci95"]
    net = comparison["only_a_correct"] - comparison["only_b_correct"]
    assert abs(comparison["drop"] - net / total) < 1e-12
    assert -1 <= low <= comparison["drop"] <= high <= 1
    assert 0 <= comparison["mcnemar_p"] <= 1


def main() -> int:
    """Check every file named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        check_results(json.loads(path.read_text()), path.parent)
        print(f"{path}: as the contract says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
