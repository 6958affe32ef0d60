"""End to end: pruning.py as a user runs it, on the bundled weights and images."""

import contextlib
import csv
import itertools
import json
import math
import random
import re
import signal
import time
import zlib

import pytest
from check_page import check_page
from check_results import check_results, without_times
from printed import read_facts, read_table, shows
from processes import REPOSITORY, Copy, run_fresh, run_here, run_together, start_together

from common.checkpoints.checkpoint import load_model
from common.files.output import OUR_ENTRIES, STAGING_PREFIX, UNFINISHED_NAME
from common.network.cascade import Cascade
from common.report.results import floor_percent
from pruning.alone import scan as scan_module
from pruning.pruning import main

SCRIPT = REPOSITORY / "pruning" / "pruning.py"
QUICK = ["--bundled", "--threads", "1", "--test-images", "20"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--verify", "--layers", "conv1,layer3.0.*,linear", "--amounts", "0.5,0.9"]
    return run_fresh(SCRIPT, *QUICK, *arguments, "--output-dir", folder), folder


def test_run_keeps_the_contract_and_tells_its_story(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert len(results["sensitivity"]) == 2 * 5
    assert results["structure"]["parameters"] == 11_173_962
    parts = ("conv_weights", "linear_weights", "biases", "batch_norm_parameters")
    assert sum(results["structure"][part] for part in parts) == 11_173_962
    verification, linear = results["verification"], results["linear_search"]
    assert verification["different"] == 0
    assert verification["pruned_weights"] == linear["pruned_weights"]
    assert linear["pruned_weights"] / 5120 == linear["max_amount"]
    assert f"Largest amount found: {floor_percent(linear['max_amount'])} of" in process.stdout
    *lines, written_to = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(folder) in written_to
    assert "Warning" not in process.stderr
    named = results["artifacts"]
    expected = {named["model"], *named["csv"], *named["plots"], "results.json"}
    assert {p.name for p in folder.iterdir()} == expected


def test_memory_stays_under_2_gib(finished):
    assert read(finished[1])["peak_memory_bytes"] < 2 << 30


def test_artifacts_are_what_was_reported(finished):
    _, folder = finished
    results = json.loads((folder / "results.json").read_text())
    state = load_model(folder / results["artifacts"]["model"]).state_dict()
    assert int(state["linear.weight"].count_nonzero()) == results["linear_search"]["kept_weights"]
    content = (folder / results["artifacts"]["model"]).read_bytes()
    savings = results["savings"]
    assert savings["pruned_bytes"] == len(content)
    assert savings["pruned_compressed_bytes"] == len(zlib.compress(content, 1))
    with (folder / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, entry in zip(rows, results["sensitivity"], strict=True):
        assert row["layer"] == entry["layer"]
        assert int(row["correct"]) == entry["accuracy"]["correct"]
        assert float(row["drop"]) == entry["comparison"]["drop"]


def test_pruned_model_can_be_pruned_again_from_another_folder(whole, tmp_path):
    weights = whole[0] / "resnet18_cifar10_pruned.pth"
    again = run_here(
        main, *QUICK, "--layers", "linear", "--weights", weights, "--json", "--quiet", "--report",
        "--output-dir", tmp_path / "out", folder=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert all(line.startswith("warning: ") for line in again.stderr.splitlines())
    results = json.loads(again.stdout)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    page = check_page((tmp_path / "out" / results["artifacts"]["report"]).read_text())
    assert floor_percent(results["linear_search"]["max_amount"]) in page.text
    assert len(page.images) == len(results["artifacts"]["plots"])


# --- the same results, however a run goes ---------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_weights):
    """The arguments of a run of three chunks, as a batch is one image."""
    return [
        "--bundled", "--threads", "1", "--test-images", "40", "--batch-size", "1",
        "--layers", "layer4.1.*", "--amounts", "0.5,0.9", "--weights", tiny_weights,
        "--precision", "fp32",  # what auto finds by timing, two processes may find otherwise
    ]  # fmt: skip


EARLIER = {
    "results.json": json.dumps(dict.fromkeys(OUR_ENTRIES, 1) | {"artifacts": {"a": "model.pth"}}),
    "model.pth": "earlier",
}


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """An unbroken run of one process, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    process = run_here(main, *small, "--output-dir", folder)
    assert process.returncode == 0, process.stderr
    return folder, time.monotonic() - started


@pytest.fixture
def slow(monkeypatch):
    """Let each chunk after the first take three seconds more, in which a run can be stopped."""
    walk, calls = Cascade.walk, itertools.count()

    def run_slowly(*arguments):
        if next(calls):
            time.sleep(3)
        return walk(*arguments)

    monkeypatch.setattr(Cascade, "walk", run_slowly)
    return monkeypatch


def wait_for_a_chunk(folder, copy):
    """Wait until the first images are finished, and the rest are not."""
    while not list(folder.glob(f"{UNFINISHED_NAME}/images-0-*")):
        assert copy.is_running(), "the run ended before it could be stopped"
        time.sleep(0.02)


@pytest.mark.full
def test_killed_at_any_moment_a_run_resumes_to_the_same_results(whole, small, slow, tmp_path):
    folder, seconds = whole
    arguments = [*small, "--resume", "--output-dir", tmp_path / "out"]
    moments = random.Random(6)
    for attempt in range(4):
        with Copy(main, *arguments, output=tmp_path / "told") as copy:
            if attempt == 0:  # once for certain between two chunks
                wait_for_a_chunk(tmp_path / "out", copy)
            else:
                copy.wait(moments.uniform(0, seconds))
        if attempt == 0:
            slow.undo()
            assert not (tmp_path / "out" / "results.json").exists()
    resumed = run_here(main, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(read(tmp_path / "out")) == without_times(read(folder))
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"earlier"}
    assert left == {path.name for path in folder.iterdir()}


def test_torchrun_finds_what_one_process_finds(whole, small, tmp_path):
    done = run_fresh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                     SCRIPT, *small, "--output-dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    together, alone = read(tmp_path / "out"), read(whole[0])
    check_results(together, tmp_path / "out")
    assert (together.pop("processes"), alone.pop("processes")) == (2, 1)
    assert without_times(together) == without_times(alone)
    assert done.stdout.count("written to") == 1
    assert sum(line.startswith("weights: ") for line in done.stderr.splitlines()) == 1
    pruned = "resnet18_cifar10_pruned.pth"
    assert (tmp_path / "out" / pruned).read_bytes() == (whole[0] / pruned).read_bytes()


@pytest.mark.parametrize("stopped", ["one killed", "all killed", "terminated"])
def test_two_processes_stopped_in_mid_scan_resume_to_the_same_results(
    stopped, whole, small, slow, tmp_path
):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in EARLIER.items():
        (folder / name).write_text(content)
    arguments = [*small, "--resume", "--output-dir", folder]
    with contextlib.ExitStack() as stack:
        copies = start_together(main, *arguments, output=tmp_path / "told")
        first, second = map(stack.enter_context, copies)
        wait_for_a_chunk(folder, first)
        second.send(signal.SIGTERM if stopped == "terminated" else signal.SIGKILL)
        if stopped != "one killed":
            first.send(signal.SIGTERM if stopped == "terminated" else signal.SIGKILL)
        assert 0 not in [copy.wait().returncode for copy in copies]
    slow.undo()
    staging = {p.name for p in folder.iterdir() if p.name.startswith(STAGING_PREFIX)}
    assert bool(staging) == (stopped == "all killed")  # nobody was left to remove it
    left = {path.name: path for path in folder.iterdir() if path.name not in staging}
    assert left.pop(UNFINISHED_NAME).is_dir()
    assert {name: path.read_text() for name, path in left.items()} == EARLIER

    alone = run_here(main, *arguments)
    assert alone.returncode == 1
    assert "left by a run that differs in the number of processes;" in alone.stderr
    again, _ = run_together(main, *arguments, output=tmp_path / "told")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    resumed, unbroken = without_times(read(folder)), without_times(read(whole[0]))
    assert resumed | {"processes": 1} == unbroken
    expected = {path.name for path in whole[0].iterdir()} | {"earlier"}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.full
def test_two_threads_repeat_themselves_and_agree_with_one_but_at_the_edge(whole, small, tmp_path):
    for name in ("a", "b"):
        process = run_here(main, *small, "--threads", "2", "--output-dir", tmp_path / name)
        assert process.returncode == 0, process.stderr
    two, again, one = (without_times(read(folder)) for folder in
                       (tmp_path / "a", tmp_path / "b", whole[0]))  # fmt: skip
    assert two == again
    for ours, theirs in zip(one["sensitivity"], two["sensitivity"], strict=True):
        assert abs(ours["accuracy"]["correct"] - theirs["accuracy"]["correct"]) <= 1
    assert one["layers"] == two["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "layer9.*"], "error: --layers layer9.*: matches none of conv1,"),
        (["--weights", "nowhere.pth"], "error: nowhere.pth: no such file"),
        (["--scope", "all"],
         "error: --scope: to be within 2 points with one standard error to spare takes"),
        (["--scope", "all", "--tolerance", "0.49", "--finetune-epochs", "1", "--finetune-images",
          "2001"],
         "error: --finetune-images 2001: only 2,000 train images in the bundled JPEG images"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_scan(
    arguments, message, tiny_weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scan_module, "run_scan", None)
    weights = ["--weights", str(tiny_weights)]  # another in the arguments takes its place
    arguments = ["--bundled", "--test-images", "20", *weights, *arguments]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(message)
    assert not (tmp_path / "out").exists()


# --- what is printed -----------------------------------------------------------------------------


def test_every_number_in_the_tables_is_that_of_results_json(finished):
    process, folder = finished
    out, results = process.stdout, read(folder)
    *rows, total = read_table(out, "layer ")
    structure = results["structure"]
    weights = structure["conv_weights"] + structure["linear_weights"]
    for row, layer in zip(rows, results["layers"], strict=True):
        assert (row[0], row[1]) == (layer["name"], "×".join(map(str, layer["shape"])))
        share = 100 * layer["weights"] / weights
        assert shows(" ".join(row[2:]), layer["weights"], share, layer["macs"] / 1e6,
                     layer["nonzeros"])  # fmt: skip
    assert shows(" ".join(total), weights, 100, structure["macs"] / 1e6, structure["nonzeros"])
    for ranking in results["ranking"]:
        title = f"Each layer pruned alone by {100 * ranking['amount']:g} %"
        rows = read_table(out[out.index(title) :], "layer ")
        entries = {
            e["layer"]: e for e in results["sensitivity"] if e["amount"] == ranking["amount"]
        }
        for row, ranked in zip(rows, ranking["layers"], strict=True):
            comparison = entries[row[0]]["comparison"]
            low, high = comparison["ci95"]
            assert row[0] == ranked["layer"]
            assert shows(row[1], 100 * entries[row[0]]["accuracy"]["value"])
            assert shows(row[2], -100 * comparison["drop"])
            assert shows(row[3], -100 * high, -100 * low)
            assert float(row[4]) == pytest.approx(comparison["mcnemar_p"], rel=0.5)
            assert shows(" ".join(row[5:7]), comparison["only_a_correct"],
                         comparison["only_b_correct"])  # fmt: skip
            assert (row[7:] == ["≈"]) == ranked["tied_with_next"]


def test_every_number_of_the_search_is_that_of_results_json(finished):
    process, folder = finished
    out, results = process.stdout, read(folder)
    linear = results["linear_search"]
    for row, step in zip(read_table(out, "step "), linear["steps"], strict=True):
        value = step["accuracy"]["value"]
        amount = math.floor(10_000 * step["amount"]) / 100
        assert shows(" ".join(row[1:5]), amount, step["pruned_weights"], 100 * value,
                     100 * (value - linear["dense"]["value"]))  # fmt: skip
        assert (row[5] == "within") == step["kept"]
    confirmed, savings = linear["confirmed"], results["savings"]
    low, high = confirmed["comparison"]["ci95"]
    dense, sparse = savings["latency"]
    splits = linear["splits"]
    found, largest = (
        math.floor(10_000 * linear[name]) / 100 for name in ("max_amount", "exhaustive_max_amount")
    )
    verification = results["verification"]
    expected = {
        "How sure that is": {
            "saved model": [100 * confirmed["accuracy"]["value"], confirmed["accuracy"]["total"],
                            -100 * confirmed["comparison"]["drop"], 95, -100 * high, -100 * low],
            "all amounts": [*([] if found == largest else [largest]), len(linear["curve"])],
            "new images": [100 * linear["tolerance"], splits["within_tolerance"], splits["splits"],
                           -100 * splits["drop"]["mean"]],
        },
        "What that saves": {
            "unpruned": [savings["dense_bytes"] / 1e6, savings["dense_compressed_bytes"] / 1e6],
            "pruned file": [savings["pruned_bytes"] / 1e6,
                            savings["pruned_compressed_bytes"] / 1e6],
            "speed": [dense["batch_size"], 90, sparse["median_ms"], dense["median_ms"]],
        },
    }  # fmt: skip
    for title, facts in expected.items():
        told = read_facts(out, title)
        for name, values in facts.items():
            assert shows(told[name], *values), told[name]
    sentences = {
        "Dense accuracy": [100 * results["baseline"]["value"], 95,
                           *(100 * limit for limit in results["baseline"]["ci95"])],
        "Largest amount found": [found, linear["pruned_weights"],
                                 linear["pruned_weights"] + linear["kept_weights"],
                                 100 * linear["tolerance"]],
        "The given file": [
            results["weights"]["size_bytes"] / 1e6,
            results["weights"]["size_bytes"] / results["network"]["parameters"], 32, 4, 16, 2,
        ],
        "Verified": [verification["different"], verification["predictions"],
                     verification["pruned_weights"], linear["pruned_weights"],
                     verification["speedup"]],
        "took": [results["wall_seconds"], results["peak_memory_bytes"] / 1e6],
    }  # fmt: skip
    for start, values in sentences.items():
        (sentence,) = re.findall(rf"^{start}(.*?)\n(?:\n|written)", out, re.MULTILINE | re.DOTALL)
        assert shows(sentence, *values), sentence
