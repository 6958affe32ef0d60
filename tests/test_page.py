"""The page that a run writes: whole, self-contained, and deaf to what names try to say."""

from __future__ import annotations

import copy

import pytest
from check_page import PNG, check_page
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files.output import OutputFolder
from common.report.page import REPORT_NAME, render, write_page


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
    "environment": {"torch": "2", "vnni": True},
    "weights": {
        "source": "bundled", "sha256": "ab12", "size_bytes": 22_440_000, "coded": False,
    },
    "data": {"source": "folder", "test_images": 10000, "calibration_images": 512},
    "wall_seconds": 61.7,
    "peak_memory_bytes": None,
    "artifacts": {"plots": ["another.png", "overview.png"]},
}  # fmt: skip
LATENCY = [{"batch_size": 32, "median_ms": 12.34, "images_per_second": 2593.2}]
INT8 = {
    "name": "int8", "engine": "fbgemm", "size_bytes": 11_250_000, "accuracy": accuracy(90),
    "latency": LATENCY, "int8_operations": [{"name": "conv1"}],
    "fp32_operations": [{"name": "layer1.0.conv1"}],
    "comparison": {
        "size_ratio": 0.25, "size_ratio_given": 0.5, "accuracy": COMPARISON,
        "speedup": [{"batch_size": 1, "value": 1.5}, {"batch_size": 32, "value": 2.75}],
    },
}  # fmt: skip
QUANTIZATION = COMMON | {
    "script": "quantization",
    "models": [
        {"name": "fp32", "engine": None, "size_bytes": 45_000_000, "accuracy": accuracy(93),
         "latency": LATENCY},
        INT8,
    ],
    "budget": {"max_drop": 0.002, "met": False,
               "steps": [{"action": "equalize", "drop": 0.004, "spare": -0.0031, "kept": True}]},
    "sparsity": {"zeros_before": 80, "weights": 100},
}  # fmt: skip
PRUNING = COMMON | {
    "script": "pruning",
    "baseline": accuracy(91),
    "sensitivity": [{"layer": "conv1", "amount": 0.9, "accuracy": accuracy(88),
                     "comparison": COMPARISON}],
    "ranking": [{"amount": 0.9, "layers": [{"layer": "conv1", "tied_with_next": True}]}],
    "linear_search": {"layers": ["linear"], "tolerance": 0.02, "max_amount": 0.9331,
                      "explanation": "no step lies"},
    "model_search": [
        {"scope": "all", "allocation": "sensitivity", "recalibrated": True, "finetune_epochs": 0,
         "max_sparsity": 0.823, "accuracy": accuracy(89), "comparison": COMPARISON,
         "within_tolerance": False, "macs_kept": 0.31},
    ],
    "model_saved": {"scope": "all", "sparsity": 0.823, "comparison": COMPARISON},
}  # fmt: skip
PIPELINE = COMMON | {
    "script": "pipeline",
    "budget": {"max_drop": 0.01, "choosing_images": 5000},
    "models": [
        {"name": name, "size_bytes": size, "accuracy": accuracy(90), "comparison": COMPARISON,
         "latency": LATENCY}
        for name, size in {"fp32": 45_000_000, "int8": 11_000_000}.items()
    ],
    "answers": [
        {"name": "both", "file_bytes": 900_000, "accuracy": accuracy(89), "macs_kept": 0.51,
         "comparison": COMPARISON, "latency": LATENCY, "within_budget": False,
         "speedup": [{"batch_size": 1, "over_fp32": 7.25, "over_int8": 1.5},
                     {"batch_size": 32, "over_fp32": 8.5, "over_int8": 1.5}]},
    ],
}  # fmt: skip
ALWAYS = (
    "--seed", "--quiet", "no", "--test-images", "all", "–", "fbgemm, qnnpack", "yes", "ab12",
    "10,000 test images (folder)", "took 62 s", "-3.12 points", "-7.00 to +1.10",
    "The given file takes 22.44 MB",
)  # fmt: skip


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (QUANTIZATION, ["ResNet18 for CIFAR‑10 in INT8", "4.00× smaller", "45.00 MB to 11.25 MB",
                        "1.50× at batch 1, 2.75× at batch 32", "7 images wrong",
                        "1 of 2 operations", "layer1.0.conv1", "80.00 %", "2593",
                        "0.2 points was not met", "equalize", "-0.40", "-0.31"]),
        (PRUNING, ["pruned layer by layer", "91.00 %", "93.31 %", "conv1", "No step lies.", "≈",
                   "82.3 %", "The whole network, as far as 2 points", "sensitivity", "31 %"]),
        (PIPELINE, ["may lose 1 points", "50.0× smaller", "7.25× at batch 1, 8.50× at batch 32",
                    "not within the budget",
                    "0.90 MB", "51 %", "12.3"]),
    ],
)  # fmt: skip
def test_everything_told_is_on_the_page(results, told):
    page = check_page(render(results, {"overview.png": PNG + b"1"}))
    for piece in (*ALWAYS, *told, "A quarter of the bytes"):
        assert piece in page.text
    assert page.images == [PNG + b"1"]


def test_a_coded_file_is_not_called_dense():
    weights = PIPELINE["weights"] | {"coded": True, "size_bytes": 27_600}
    page = check_page(render(PIPELINE | {"weights": weights}, {}))
    assert "0.03 MB (a coded network)" in page.text
    assert "dense FP32 on" in page.text  # the explanation of the column
    assert page.text.count("dense") == 1


def test_arguments_that_are_none_mean_all_images_or_nothing():
    content = render(QUANTIZATION, {})
    for flag, shown in {"test-images": "all", "finetune-images": "all", "threads": "–"}.items():
        assert f"<dt>--{flag}</dt><dd>{shown}</dd>" in content


def test_plots_that_the_page_knows_come_first(tmp_path):
    results = copy.deepcopy(QUANTIZATION)
    with OutputFolder(tmp_path / "out") as folder:
        for name in results["artifacts"]["plots"]:
            folder.file(name).write_bytes(PNG + name.encode())
        write_page(results, folder)
        folder.commit()
    assert results["artifacts"]["report"] == REPORT_NAME
    page = check_page((tmp_path / "out" / REPORT_NAME).read_text())
    assert page.images == [PNG + f"{name}.png".encode() for name in ("overview", "another")]
    assert "another.png" in page.text


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
    step = {"action": name, "drop": 0.0, "spare": 0.0, "kept": name}
    model = {"name": "int8", "engine": name, "fp32_operations": [{"name": name}]}
    results = QUANTIZATION | {
        "models": [QUANTIZATION["models"][0], INT8 | model],
        "budget": {"max_drop": 0.1, "met": True, "steps": [step]},
    }
    for group in ("arguments", "environment", "weights"):
        results[group] = results[group] | {name: name, "observer": name, "source": name}
    content = render(results, {name: PNG})
    content.encode()
    page = check_page(content)  # no tag and no attribute that the page would not have anyway
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert page.text.count(visible) >= 10
