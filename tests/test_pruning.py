"""End to end: pruning.py as a user runs it, on the bundled weights and images."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from check_results import check_results

from common.checkpoint import load_model
from pruning.artifacts import load_packed
from pruning.pruning import main

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "pruning" / "pruning.py"
QUICK = ["--bundled", "--threads", "1", "--test-images", "20"]


def run(*arguments, cwd=REPOSITORY, script=SCRIPT):
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def without_times(results):
    """Drop what differs between two runs: times, how they were started, where results went."""
    if isinstance(results, dict):
        timed = {"latency", "wall_seconds", "output_dir", "resume", "json", "quiet", "overwrite"}
        return {k: without_times(v) for k, v in results.items() if k not in timed}
    return [without_times(v) for v in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--verify", "--layers", "conv1,layer3.0.*,linear", "--amounts", "0.5,0.9"]
    return run(*QUICK, *arguments, "--holdout", "--output-dir", folder), folder


def test_run_keeps_the_contract_and_tells_its_story(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert len(results["sensitivity"]) == 2 * 5
    assert results["structure"]["parameters"] == 11_173_962
    parts = ("conv_weights", "linear_weights", "biases", "batch_norm_parameters")
    assert sum(results["structure"][part] for part in parts) == 11_173_962
    assert results["verification"]["different"] == 0
    assert results["linear_search"]["holdout"]["accuracy"]["total"] == 10
    assert f"{100 * results['linear_search']['max_amount']:.2f} %" in process.stdout
    *lines, written_to = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(folder) in written_to
    assert "Warning" not in process.stderr
    named = results["artifacts"]
    expected = {named["model"], named["packed"], *named["csv"], *named["plots"], "results.json"}
    assert {p.name for p in folder.iterdir()} == expected


def test_artifacts_are_what_was_reported(finished):
    _, folder = finished
    results = json.loads((folder / "results.json").read_text())
    state = load_model(folder / results["artifacts"]["model"]).state_dict()
    packed = load_packed(folder / results["artifacts"]["packed"])
    assert all(torch.equal(packed[name], tensor) for name, tensor in state.items())
    assert int(state["linear.weight"].count_nonzero()) == results["linear_search"]["kept_weights"]
    assert (folder / results["artifacts"]["packed"]).stat().st_size == (
        results["savings"]["packed_bytes"]
    )
    with (folder / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, entry in zip(rows, results["sensitivity"], strict=True):
        assert row["layer"] == entry["layer"]
        assert int(row["correct"]) == entry["accuracy"]["correct"]
        assert float(row["drop"]) == entry["comparison"]["drop"]


def test_pruned_model_can_be_pruned_again_from_another_folder(finished, tmp_path):
    _, folder = finished
    weights = folder / "resnet18_cifar10_pruned.pth"
    again = run(*QUICK, "--layers", "linear", "--weights", weights, "--json", "--quiet",
                "--output-dir", tmp_path / "out", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert all(line.startswith("warning: ") for line in again.stderr.splitlines())
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_killed_run_resumes_to_the_same_results(tmp_path):
    common = ["--bundled", "--threads", "1", "--test-images", "32", "--batch-size", "1"]
    common += ["--layers", "layer4.*"]
    arguments = [sys.executable, str(SCRIPT), *common, "--output-dir", str(tmp_path / "killed")]
    journal = tmp_path / "killed" / "scan.journal"
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and b'"images 0-' in journal.read_bytes()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = run(*common, "--resume", "--output-dir", tmp_path / "killed")
    whole = run(*common, "--output-dir", tmp_path / "whole")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    assert "resuming" in resumed.stderr
    assert not journal.exists()
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")
    )
    assert without_times(first) == without_times(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "layer9.*"], "error: --layers layer9.*: matches none of conv1,"),
        (["--weights", "nowhere.pth"], "error: nowhere.pth: no such file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["--bundled", *arguments, "--output-dir", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--amount", "1.5"], ["--amount", "0.5", "--amounts", "0.5"], ["--precision", "x"]],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
