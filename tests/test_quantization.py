"""End to end: quantization.py as a user runs it, on the bundled weights and images."""

import json
import math

import pytest
import torch
from check_page import check_page
from check_results import check_results, without_times
from printed import read_facts, read_table, shows
from processes import REPOSITORY, run_fresh, run_here
from resnet18 import Widths, weight_modules
from torch.nn.utils import prune

from common.measure.evaluate import compare, measure_accuracy
from common.search.budget import Verdict
from quantization.accuracy.budget import HeldOutEvaluator
from quantization.files.artifact import load_int8
from quantization.int8 import engines
from quantization.quantization import main

SCRIPT = REPOSITORY / "quantization" / "quantization.py"
QUICK = [
    "--bundled", "--threads", "1", "--test-images", "100", "--calibration-images", "32",
    "--batch-sizes", "1,4", "--timing-seconds", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return run_fresh(SCRIPT, *QUICK, "--output-dir", folder), folder


def test_run_keeps_the_contract_and_tells_its_story(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    int8 = next(model for model in results["models"] if model["name"] == "int8")
    assert f"{100 * int8['accuracy']['value']:.2f} %" in process.stdout
    assert f"{int8['size_bytes'] / 1e6:.2f} MB" in process.stdout
    *lines, written_to = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(folder) in written_to
    assert "bundled weights" in process.stderr
    assert "bundled JPEG images" in process.stderr
    assert "Warning" not in process.stderr
    accuracy = results["comparison"]["accuracy"]
    flips = {"flips.png"} & set(results["artifacts"]["plots"])  # only where an answer changes
    assert flips or not accuracy["only_a_correct"] + accuracy["only_b_correct"]
    assert {p.name for p in folder.iterdir()} == flips | {
        "overview.png", "ranges.png", "resnet18_cifar10_int8.safetensors", "results.json",
    }  # fmt: skip


def test_memory_stays_under_2_gib(finished):
    assert json.loads((finished[1] / "results.json").read_text())["peak_memory_bytes"] < 2 << 30


def test_auto_keeps_the_fastest_and_onnx_agrees_with_torch(tiny_weights, tmp_path):
    folder = tmp_path / "out"
    process = run_here(
        main, *QUICK, "--engines", "qnnpack,auto,qnnpack", "--export-onnx", "--json",
        "--weights", tiny_weights, "--output-dir", folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    check_results(results, folder)
    int8 = [model for model in results["models"] if model["name"] == "int8"]
    assert {model["engine"] for model in int8} == {"qnnpack", *engines.candidate_engines()}
    for index, entry in enumerate(results["fastest"]):
        medians = {model["engine"]: model["latency"][index]["median_ms"] for model in int8}
        assert medians[entry["engine"]] == min(medians.values())
    times = [math.prod(t["median_ms"] for t in model["latency"]) for model in int8]
    assert times == sorted(times)
    assert results["comparison"] == int8[0]["comparison"]
    assert results["artifacts"]["model"] == int8[0]["file"]
    (exported,) = (model for model in results["models"] if model["name"] == "int8-onnx")
    assert exported["agreement"] >= 0.98
    written = {p.name for p in folder.iterdir()} - {"results.json"}
    assert written == {*results["artifacts"]["models"], *results["artifacts"]["plots"]}


def test_a_budget_a_diagnosis_and_a_coded_file_in_one_run(tiny_weights, tmp_path, monkeypatch):
    correct = torch.arange(40) >= 39  # of the held-out images, but with layers in FP32
    verdict = Verdict(measure_accuracy(correct), compare(torch.ones_like(correct), correct), -1.0)
    monkeypatch.setattr(HeldOutEvaluator, "judge", lambda *_: verdict)
    folder = tmp_path / "out"
    process = run_here(
        main, *QUICK, "--weights", tiny_weights, "--max-drop", "0.05", "--held-out-images", "40",
        "--diagnose", "--bits-per-weight", "2", "--coding-images", "20", "--write-check",
        "--output-dir", folder,
    )  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert process.returncode == (0 if results["budget"]["met"] else 3), process.stderr
    check_results(results, folder)
    (restored,) = results["budget"]["fp32_layers"]
    assert [row["layer"] for row in results["diagnosis"]][::20] == ["conv1", "linear"]
    checks = {path.name for path in folder.glob("*.check")}
    assert checks == {path.with_suffix(".check").name for path in folder.glob("*.safetensors")}
    assert checks == set(results["artifacts"]["checks"])
    coded = load_int8(folder / results["coding"]["file"])
    assert coded(torch.zeros(1, 3, 32, 32)).isfinite().all()
    for shown in (
        "tried, on held-out training images", f"{restored} in FP32", "The coded file",
        "On held-out images the loss and one standard error", "(40 images",
    ):  # fmt: skip
        assert shown in " ".join(process.stdout.split())
    assert all(len(line) <= 80 for line in process.stdout.splitlines()[:-1])  # the last: a path


def test_same_seed_same_results_from_another_folder_with_json(tiny_weights, tmp_path):
    arguments = [*QUICK, "--weights", tiny_weights, "--output-dir"]
    process = run_fresh(SCRIPT, *arguments, tmp_path / "a")
    assert process.returncode == 0, process.stderr
    first = json.loads((tmp_path / "a" / "results.json").read_text())
    arguments = ["--json", "--quiet", *arguments, tmp_path / "b"]
    process = run_here(main, *arguments, folder=SCRIPT.parent)
    assert process.returncode == 0, process.stderr
    second = json.loads(process.stdout)
    first["arguments"] |= {"json": True, "quiet": True}
    assert without_times(first) == without_times(second)
    assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    written = (tmp_path / "b" / "results.json").read_text()
    assert written == process.stdout


def test_torchrun_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = run_here(main, *QUICK, "--output-dir", tmp_path / "out")
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert "start without torchrun" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_two_threads_agree_with_one_but_at_the_edge(finished, tmp_path):
    process = run_here(main, *QUICK, "--threads", "2", "--json", "--output-dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    first = json.loads((finished[1] / "results.json").read_text())
    second = json.loads(process.stdout)
    for one, two in zip(first["models"], second["models"], strict=True):
        assert abs(one["accuracy"]["correct"] - two["accuracy"]["correct"]) <= 1
        for name in ("name", "size_bytes", "settings", "int8_operations"):
            assert one.get(name) == two.get(name)


def test_a_pruned_network_keeps_its_zeros_in_a_smaller_file(make_network, tmp_path):
    model = make_network(Widths((16, 32, 64, 128)))
    layers = [(layer, "weight") for layer in weight_modules(model).values()]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.7)
    for layer, name in layers:
        prune.remove(layer, name)
    weights = tmp_path / "pruned.pth"
    torch.save(model.state_dict(), weights)
    process = run_here(
        main, *QUICK, "--weights", weights, "--report", "--output-dir", tmp_path / "out"
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_results(results, tmp_path / "out")
    page = check_page((tmp_path / "out" / results["artifacts"]["report"]).read_text())
    assert f"{1 / results['comparison']['size_ratio']:.2f}× smaller" in page.text
    assert len(page.images) == len(results["artifacts"]["plots"])
    sparsity = results["sparsity"]
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in layers)
    assert sparsity["zeros_before"] == zeros
    assert results["comparison"]["size_ratio"] < 1 / 8
    assert "70.00 % of its weights are zero" in process.stdout


@pytest.mark.full
def test_targets_on_the_full_size_weights_and_images(tmp_path):
    shared = REPOSITORY.parent / "shared"
    weights = shared / "weights" / "resnet18_cifar10.pth"
    if not weights.exists():
        pytest.skip("no ../shared")
    process = run_fresh(
        SCRIPT, "--weights", weights, "--bundled", "--test-images", "2000", "--batch-sizes", "1",
        "--timing-seconds", "1", "--output-dir", tmp_path / "out", "--json", "--quiet",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    comparison = json.loads(process.stdout)["comparison"]
    assert comparison["size_ratio"] <= 0.26
    assert comparison["accuracy"]["drop"] <= 0.003


def test_where_there_is_no_fbgemm_all_is_done_with_qnnpack(tiny_weights, tmp_path, monkeypatch):
    """As on Arm: x86 builds of torch have qnnpack too."""
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", "qnnpack"])
    process = run_here(main, *QUICK, "--weights", tiny_weights, "--output-dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_results(results, tmp_path / "out")
    assert results["models"][-1]["engine"] == "qnnpack"
    assert results["comparison"]["accuracy"]["drop"] < 0.05
    assert "using qnnpack" in process.stderr


def test_every_number_in_the_tables_is_that_of_results_json(finished):
    process, folder = finished
    results = json.loads((folder / "results.json").read_text())
    for row, model in zip(read_table(process.stdout, "images/s at"), results["models"],
                          strict=True):  # fmt: skip
        speeds = [entry["images_per_second"] for entry in model["latency"]]
        assert shows(" ".join(row[1:]), model["size_bytes"] / 1e6, 100 * model["accuracy"]["value"],
                     *speeds)  # fmt: skip
    lines = process.stdout.splitlines()
    model = results["models"][-1]
    comparison, accuracy = model["comparison"], model["comparison"]["accuracy"]
    ratio, (low, high) = comparison["size_ratio"], accuracy["ci95"]
    speeds = [number for e in comparison["speedup"] for number in (e["value"], e["batch_size"])]
    fp32 = next(entry for entry in results["models"] if entry["name"] == "fp32")
    times = [
        number
        for before, after in zip(fp32["latency"], model["latency"], strict=True)
        for number in (before["median_ms"], after["median_ms"], after["batch_size"])
    ]
    expected = {
        "size": [100 * (1 - ratio), 1 / ratio, 1 / comparison["size_ratio_given"]],
        "accuracy": [-100 * accuracy["drop"], 95, -100 * high, -100 * low],
        "images": [accuracy["only_a_correct"], accuracy["only_b_correct"], accuracy["mcnemar_p"]],
        "time": times,
        "speed": [*speeds, 32, *(entry["value"] for entry in model["speedup_over_nchw"])],
        "coverage": [len(model["int8_operations"]) + len(model["fp32_operations"]), 8],
    }
    facts = read_facts(process.stdout, "INT8 fbgemm against FP32")
    assert facts.keys() == expected.keys()
    for name, values in expected.items():
        assert shows(facts[name], *values), facts[name]
    took = next(line for line in lines if line.startswith("took "))
    assert shows(took, results["wall_seconds"], results["peak_memory_bytes"] / 1e6)
