"""The page that a run writes: whole, self-contained, and deaf to what names try to say."""

from __future__ import annotations

import pytest
from check_page import PNG, check_page
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files.output import OutputFolder
from common.report.page import REPORT_NAME, render, write_page
from common.report.results import DOUBT
from common.report.story import Column, Facts, Story, Table, how_to_load
from pipeline.story import tell as tell_pipeline
from pruning.report.story import tell as tell_pruning
from quantization.report.story import tell as tell_quantization


def accuracy(correct: int) -> dict:
    return {"correct": correct, "total": 100, "value": correct / 100, "ci95": [0.8, 0.95]}


COMPARISON = {
    "drop": 0.0312, "ci95": [-0.011, 0.07], "mcnemar_p": 0.125, "only_a_correct": 7,
    "only_b_correct": 4,
}  # fmt: skip
COMMON = {
    "arguments": {
        "seed": 0, "quiet": False, "threads": None, "test_images": None, "finetune_images": None,
        "engines": ["fbgemm", "qnnpack"], "observer": "histogram", "tolerance": 0.02,
        "sparsity": 0.75, "engine": "x86",
    },
    "environment": {
        "torch": "2", "vnni": True, "threads": 1, "cpu": "a CPU", "device": "cpu",
    },
    "network": {"family": "resnet18-cifar", "macs": 555422720, "parameters": 11_220_000},
    "weights": {
        "source": "bundled", "sha256": "ab12", "size_bytes": 22_440_000, "coded": False,
    },
    "data": {"source": "folder", "test_images": 10000, "calibration_images": 512},
    "made": {
        "date": "2026-01-02T03:04:05+00:00", "version": "1.2.3", "commit": "abcdef012345",
        "packages": {"torch": "2.14.1", "numpy": "2.4"},
    },
    "wall_seconds": 61.7,
    "peak_memory_bytes": None,
    "artifacts": {"model": "m.safetensors", "plots": ["another.png", "overview.png"]},
}  # fmt: skip
LATENCY = [{"batch_size": 32, "median_ms": 12.34, "images_per_second": 2593.2, "noisy": False}]
INT8 = {
    "name": "int8", "engine": "fbgemm", "size_bytes": 11_250_000, "accuracy": accuracy(90),
    "latency": LATENCY, "int8_operations": [{"name": "conv1"}],
    "fp32_operations": [{"name": "layer1.0.conv1"}],
    "comparison": {
        "size_ratio": 0.25, "size_ratio_given": 0.5, "accuracy": COMPARISON,
        "speedup": [{"batch_size": 1, "value": 1.5, "noisy": False},
                    {"batch_size": 32, "value": 2.75, "noisy": False}],
    },
    "speedup_over_nchw": [{"batch_size": 1, "value": 3.5, "noisy": False},
                          {"batch_size": 32, "value": 4.25, "noisy": False}],
}  # fmt: skip
QUANTIZATION = COMMON | {
    "models": [
        {"name": "fp32", "engine": None, "size_bytes": 45_000_000, "accuracy": accuracy(93),
         "latency": LATENCY},
        INT8,
    ],
    "comparison": {"size_ratio": 0.2},
    "per_class": [{"class": "cat", "fp32": 0.8, "int8": 0.7}],
    "budget": {"max_drop": 0.002, "met": False, "held_out_drop": 0.005, "held_out_spare": -0.01,
               "held_out_images": 1400, "held_out_engine": "fbgemm", "test_drop": 0.0312,
               "test_engine": "x86",
               "steps": [{"action": "equalize", "drop": 0.004, "spare": -0.0031, "kept": True}]},
    "sparsity": {"zeros_before": 80, "zeros_after": 85, "weights": 100},
}  # fmt: skip
PRUNING = COMMON | {
    "baseline": accuracy(91),
    "structure": {"conv_weights": 27, "linear_weights": 10, "biases": 1, "macs": 40,
                  "batch_norm_parameters": 2, "parameters": 40, "nonzeros": 37},
    "layers": [{"name": "conv1", "shape": [1, 3, 3, 3], "weights": 27, "macs": 30, "nonzeros": 27}],
    "sensitivity": [{"layer": "conv1", "amount": 0.9, "achieved": 0.9, "accuracy": accuracy(88),
                     "comparison": COMPARISON}],
    "ranking": [{"amount": 0.9, "layers": [{"layer": "conv1", "tied_with_next": True}]}],
    "model_search_seconds": 7.0,
    "model_search": [
        {"scope": "all", "allocation": "sensitivity", "recalibrated": True, "finetune_epochs": 1,
         "max_sparsity": 0.82399, "accuracy": accuracy(89), "comparison": COMPARISON,
         "within_tolerance": False, "macs_kept": 0.31, "chosen_on_images": 1,
         "points": [{"sparsity": 0.75, "accuracy": accuracy(88), "comparison": COMPARISON}]},
    ],
    "model_saved": {
        "scope": "all", "allocation": "sensitivity", "recalibrated": True, "finetune_epochs": 0,
        "sparsity": 0.82399, "macs_kept": 0.31, "accuracy": accuracy(89), "comparison": COMPARISON,
        "pruned_bytes": 40_000_000, "pruned_compressed_bytes": 5_000_000,
        "dense_compressed_bytes": 30_000_000,
        "latency": [{"batch_size": 1, "median_ms": 3.0, "noisy": False},
                    {"batch_size": 1, "median_ms": 4.0, "noisy": False}],
    },
}  # fmt: skip
PIPELINE = COMMON | {
    "budget": {"max_drop": 0.01, "choosing_images": 5000},
    "models": [
        {"name": name, "size_bytes": size, "accuracy": accuracy(90), "comparison": COMPARISON,
         "latency": LATENCY}
        for name, size in {"fp32": 45_000_000, "int8": 11_000_000}.items()
    ],
    "answers": [
        {"name": "both", "file": "both.safetensors", "file_bytes": 900_000, "size_ratio": 50.0,
         "size_ratio_given": 24.9, "accuracy": accuracy(89), "macs_kept": 0.51,
         "comparison": COMPARISON, "latency": LATENCY, "within_budget": False,
         "speedup": [{"batch_size": 1, "over_fp32": 7.25, "over_int8": 1.5, "noisy": False},
                     {"batch_size": 32, "over_fp32": 8.5, "over_int8": 1.5, "noisy": False}]},
    ],
}  # fmt: skip
ALWAYS = (
    "--seed", "--quiet", "no", "--test-images", "all", "–", "fbgemm, qnnpack", "yes", "ab12",
    "ResNet18 (CIFAR layout)", "10,000 test images (folder), 1 thread, a CPU", "took 62 s",
    "-3.12", "-7.00 to +1.10", "The given file takes 22.44 MB",
    "results.json, m.safetensors, another.png, overview.png",
    "555,422,720", "2026-01-02T03:04:05+00:00", "1.2.3", "abcdef012345", "torch 2.14.1, numpy 2.4",
    "m.safetensors: from quantization import load_int8",
)  # fmt: skip


@pytest.mark.parametrize(
    ("tell", "results", "told"),
    [
        (tell_quantization, QUANTIZATION,
         ["in INT8", "4.00× smaller", "45.00 MB to 11.25 MB", "2.00× smaller than the given file",
          "2.0 bytes for each parameter", "75 % less", "McNemar's p: how likely",
          "1.50× at batch 1, 2.75× at batch 32", "3.50×, 4.25×", "7 lost, 4 gained",
          "12.3 to 12.3 ms at batch 32",
          "1 of 2 operations", "layer1.0.conv1", "80.00 %", "2,593", "0.2 points: NOT met",
          "equalize", "-0.40", "-0.31", "rounding adds 5", "cat changes most"]),
        (tell_pruning, PRUNING,
         ["pruned", "91.00 %", "conv1", "≈", "82.3 %", "Linear layers: none at the end",
          "The whole network: the largest sparsity within 2 points", "sensitivity", "31 %",
          "tuned", "1 image with one standard error", "(1 epoch)", "-3.1 ±4.0",
          "6.0× smaller than dense", "4.5× smaller than the given file",
          "For 1 image the pruned network took 4 ms, the network as given 3 ms",
          "Weights: 27 (conv) + 10 (linear); batch norms: 2", "the next row (p > 0.05)"]),
        (tell_pipeline, PIPELINE,
         ["The budget is a loss of 1 point", "50.0× smaller", "7.25× at batch 1, 8.50× at batch 32",
          "both: not within the budget; both.safetensors", "0.90", "51 %", "12.3", "24.9×",
          "quantization.py writes it"]),
    ],
)  # fmt: skip
def test_console_and_page_tell_the_same(tell, results, told, tmp_path):
    story = tell(results)
    page = check_page(render(story, results, {}))
    for piece in (*ALWAYS, *told):
        assert piece in page.text
    console = " ".join(story.text(tmp_path).split())
    for part in story.parts:
        if isinstance(part, Table):
            cells = sum(part.cells, [column.heading for column in part.shown])
        else:
            cells = part.pairs.values() if isinstance(part, Facts) else [part]
        for cell in cells:
            assert " ".join(cell.split()) in console
            assert cell in page.text
    assert max(map(len, story.text(tmp_path).splitlines()[:-1])) < 80


def with_noise(value: object) -> object:
    if isinstance(value, dict):
        changed = {"noisy": True} if "noisy" in value else {}
        return {name: with_noise(inner) for name, inner in value.items()} | changed
    return [with_noise(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("tell", "results", "told"),
    [
        (tell_quantization, QUANTIZATION,
         ["1.50×? at batch 1, 2.75×? at batch 32", "3.50×?, 4.25×?", "2,593?", DOUBT]),
        (tell_pruning, PRUNING, ["took 4? ms"]),
        (tell_pipeline, PIPELINE, ["7.25×? at batch 1", "12.3?", "1.0×?", DOUBT]),
    ],
)  # fmt: skip
def test_noisy_timings_are_doubted_beside_each_figure(tell, results, told):
    noisy = with_noise(results)
    page = check_page(render(tell(noisy), noisy, {}))
    for piece in told:
        assert piece in page.text
    assert "?" not in check_page(render(tell(results), results, {})).text


def test_fp32_is_not_compared_with_itself():
    size, speed = (part for part in tell_pipeline(PIPELINE).parts if isinstance(part, Table))
    fp32 = dict(zip((c.heading for c in size.shown), size.cells[0], strict=True))
    assert (fp32["smaller"], fp32["than given"], fp32["points"]) == ("", "", "")
    assert speed.cells[0] == ["dense FP32", "12.3", ""]


@pytest.mark.parametrize(("size_bytes", "told"), [(44_990_000, False), (22_440_000, True)])
def test_a_given_file_as_large_as_fp32_has_no_column(size_bytes, told):
    weights = PIPELINE["weights"] | {"size_bytes": size_bytes}
    size, _ = (
        p for p in tell_pipeline(PIPELINE | {"weights": weights}).parts if hasattr(p, "rows")
    )
    assert ("than given" in [column.heading for column in size.shown]) == told


@pytest.mark.parametrize(("p", "told"), [(0.06, True), (0.04, False)])
def test_an_interval_and_a_p_that_disagree_are_explained(p, told):
    changed = PRUNING["sensitivity"][0] | {
        "comparison": COMPARISON | {"ci95": [0.001, 0.06], "mcnemar_p": p}
    }
    text = "".join(p.text() for p in tell_pruning(PRUNING | {"sensitivity": [changed]}).parts
                   if isinstance(p, Table))  # fmt: skip
    assert ("different methods" in text) == told


def test_a_coded_file_is_not_called_dense():
    weights = PIPELINE["weights"] | {"coded": True, "size_bytes": 27_600}
    story = tell_pipeline(PIPELINE | {"weights": weights})
    assert "0.03 MB, a coded network" in story.parts[0]
    assert not any("dense" in part.text() for part in story.parts if isinstance(part, Table))


def test_arguments_that_are_none_mean_all_images_or_nothing():
    content = render(tell_quantization(QUANTIZATION), QUANTIZATION, {})
    for flag, shown in {"test-images": "all", "finetune-images": "all", "threads": "–"}.items():
        assert f"<dt>--{flag}</dt><dd>{shown}</dd>" in content


def test_plots_with_captions_come_first(tmp_path):
    results = QUANTIZATION | {"artifacts": dict(QUANTIZATION["artifacts"])}
    with OutputFolder(tmp_path / "out") as folder:
        for name in results["artifacts"]["plots"]:
            folder.file(name).write_bytes(PNG + name.encode())
        write_page(tell_quantization(results), results, folder)
        folder.commit()
    assert results["artifacts"]["report"] == REPORT_NAME
    page = check_page((tmp_path / "out" / REPORT_NAME).read_text())
    assert page.images == [PNG + f"{name}.png".encode() for name in ("overview", "another")]
    assert "another.png" in page.text
    assert "images a second of each model" in page.text


def test_each_kind_of_file_is_told_how_to_be_loaded():
    names = ["a.safetensors", "a.check", "a.onnx", "b.pth", "b.csv"]
    (facts,) = how_to_load({"model": "a.safetensors", "models": names, "plots": ["p.png"]})
    kinds = {"INT8": "a.safetensors", "check": "a.check", "ONNX": "a.onnx", "FP32": "b.pth"}
    assert {kind: how.partition(":")[0] for kind, how in facts.pairs.items()} == kinds
    assert how_to_load({"plots": ["p.png"]}) == []


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>.pth',
    "</style></title><script>",
    "&lt;b&gt;",
    "{{ results }}{% raw %}",
    "a\u202eb\x00c\nd\x1b[31m",
    "\udcff.pth",  # a file name that is no UTF-8
]


@settings(max_examples=30)
@given(st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=40))
def test_no_name_becomes_markup(name):
    table = Table(name, [Column(name, lambda row: row)], [name], name)
    story = Story(name, name, [(name, name)], [name, table, Facts(name, {name: name})],
                  {name: name}, name)  # fmt: skip
    results = COMMON | {"artifacts": {"model": name}}
    for group in ("arguments", "environment", "network", "weights"):
        results[group] = results[group] | {name: name, "source": name}
    content = render(story, results, {name: PNG})
    content.encode()
    page = check_page(content)  # no tag and no attribute that the page would not have anyway
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert page.text.count(visible) >= 20
