"""End to end: pipeline.py as a user runs it, on the bundled weights and images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_page import check_page
from check_results import check_results
from printed import read_table, shows

from common.checkpoint import load_model
from common.model import prunable_layers
from pipeline import stages
from pipeline.pipeline import main
from quantization.artifact import load_int8

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "pipeline" / "pipeline.py"
QUICK = [
    "--bundled", "--test-images", "100", "--calibration-images", "32", "--batch-sizes", "1,4",
    "--timing-seconds", "0.1",
]  # fmt: skip


def run(*arguments, cwd=REPOSITORY, script=SCRIPT):
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return run(*QUICK, "--recalibrate-bn", "--report", "--output-dir", folder), folder


def test_run_keeps_the_contract_and_tells_its_story(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    last = results["stages"][-1]
    assert last["size_ratio"] < 1 / 8
    assert f"{1 / last['size_ratio']:.1f}× smaller" in process.stdout
    assert f"{100 * last['accuracy']['value']:.2f}" in process.stdout
    *lines, written_to = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(folder) in written_to
    assert "Warning" not in process.stderr
    named = results["artifacts"]
    assert {p.name for p in folder.iterdir()} == {
        *named["models"], *named["plots"], named["report"], "results.json",
    }  # fmt: skip


def test_every_number_is_that_of_results_json(finished):
    process, folder = finished
    results = json.loads((folder / "results.json").read_text())
    stages_, (dense, *_, last) = results["stages"], results["stages"]
    rows = read_table(process.stdout, " " * len("+ batch norm"))
    for row, stage in zip(rows, stages_, strict=True):
        low, high = stage["comparison"]["ci95"]
        paired = [-100 * stage["comparison"]["drop"], -100 * high, -100 * low]
        assert shows(
            " ".join(row[1:]),
            *(stage[f"{form}_bytes"] / 1e6 for form in ("plain", "compressed", "packed")),
            1 / stage["size_ratio"],
            100 * stage["accuracy"]["value"],
            *(paired if stage is not dense else []),
            *(entry["median_ms"] for entry in stage["latency"]),
        ), row
    low, high = last["comparison"]["ci95"]
    speed = [
        number
        for a, b in zip(dense["latency"], last["latency"], strict=True)
        for number in (a["median_ms"] / b["median_ms"], a["batch_size"])
    ]
    lines = process.stdout.splitlines()
    for start, values in {
        f"{100 * last['sparsity']:.1f}": [
            100 * last["sparsity"], 8, last["packed_bytes"] / 1e6, 1 / last["size_ratio"],
        ],
        "accuracy": [-100 * last["comparison"]["drop"], 95, -100 * high, -100 * low],
        "speed": [*speed, 8],
        "took": [results["wall_seconds"], results["peak_memory_bytes"] / 1e6],
    }.items():  # fmt: skip
        line = next(line for line in lines if line.startswith(start))
        assert shows(line, *values), line


def test_files_are_what_was_reported(finished):
    _, folder = finished
    last = json.loads((folder / "results.json").read_text())["stages"][-1]
    fp32 = load_model(folder / stages.FP32_NAME)
    plain, packed = (load_int8(folder / n) for n in (stages.INT8_NAME, stages.INT8_PACKED_NAME))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(images), packed(images))
    weights = [layer.weight for layer in prunable_layers(fp32).values()]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert pytest.approx(zeros, abs=1e-3) == 0.75
    assert last["sparsity"] >= zeros


def test_report_tells_the_same(finished):
    _, folder = finished
    results = json.loads((folder / "results.json").read_text())
    page = check_page((folder / "report.html").read_text())
    assert page.images == [(folder / "pipeline.png").read_bytes()]
    last = results["stages"][-1]
    for shown in ("dense FP32", "+ batch norm", f"{1 / last['size_ratio']:.1f}× smaller"):
        assert shown in page.text


def test_json_from_another_folder(tmp_path):
    arguments = ["--json", "--quiet", *QUICK, "--sparsity", "0.5", "--allocation", "uniform"]
    process = run(
        *arguments, "--output-dir", tmp_path / "out", cwd=SCRIPT.parent, script="pipeline.py"
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    check_results(results, tmp_path / "out")
    assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    assert (tmp_path / "out" / "results.json").read_text() == process.stdout


def test_two_processes_find_what_one_finds(check_two_processes):
    check_two_processes(SCRIPT, *QUICK)


def test_bad_input_is_one_line_and_changes_nothing(tmp_path, capsys):
    assert main(["--bundled", "--weights", "no.pth", "--output-dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no.pth: no such file"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--sparsity", "1.5"], ["--allocation", "x"], ["--engine", "nope"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_help_needs_no_torch():
    code = "import runpy, sys; sys.argv = ['pipeline.py', '--help']\ntry:\n"
    code += f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit:\n    print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert process.stdout.splitlines()[-1] == "False"
    assert "default: 0.75" in process.stdout
