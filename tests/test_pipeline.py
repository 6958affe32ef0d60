"""End to end: pipeline.py on a tiny network and the bundled images, all that it does but slower."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from check_page import check_page
from check_results import check_results, without_times
from cifar import normalize
from printed import read_table, shows
from processes import REPOSITORY, run_here
from resnet18 import Widths

from common.checkpoints.checkpoint import load_model
from common.files.output import UNFINISHED_NAME
from common.search.trials import Range, run_trials
from pipeline import answers
from pipeline.pipeline import main
from pruning.channels.slimmer import Slimmer
from quantization.files.artifact import load_int8
from quantization.int8.engines.onnx_engines import load_onnx
from runtime.decode import MAX_DIFFERENCE, check, load

SCRIPT = REPOSITORY / "pipeline" / "pipeline.py"
QUICK = [
    "--bundled", "--threads", "1", "--test-images", "120", "--calibration-images", "40",
    "--batch-sizes", "1,4", "--timing-seconds", "0.05", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _few_trials():
    """Two trials for each goal; test_search_trials.py is about where more of them lead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            answers,
            "run_trials",
            lambda make, where: run_trials(make, replace(where, trials=2)),
        )
        yield


@pytest.fixture(scope="module")
def finished(tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    process = run_here(
        main, *QUICK, "--weights", tiny_weights, "--max-drop", "0.49", "--report", "--export-onnx",
        "--write-check", "--output-dir", folder, reads_back_here=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process, folder, json.loads((folder / "results.json").read_text())


def test_each_file_passes_its_check(finished):
    _, folder, results = finished
    for answer in results["answers"]:
        path = folder / answer["file"]
        images, same, difference = check(load(path), path.with_suffix(".check"))
        assert images == 16
        assert same >= 12  # an untrained network: the logits of two classes may nearly be equal
        assert difference < MAX_DIFFERENCE
    assert len(results["artifacts"]["checks"]) == len(results["answers"])


def test_run_keeps_the_contract(finished):
    process, folder, results = finished
    check_results(results, folder)
    assert [answer["name"] for answer in results["answers"]] == ["size", "speed", "both"]
    *lines, written_to = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(folder) in written_to
    named = results["artifacts"]
    assert {p.name for p in folder.iterdir()} == {
        *named["models"], *named["checks"], *named["plots"], named["report"], "results.json",
    }  # fmt: skip


def test_every_number_is_that_of_results_json(finished):
    process, _, results = finished
    told = process.stdout  # without a column for the given file, which is as large as FP32's
    fp32, *others = [*results["models"], *results["answers"]]
    first, *rows = read_table(told, " " * len("dense FP32"))
    assert shows(" ".join(first[1:]), fp32["size_bytes"] / 1e6,
                 100 * fp32["accuracy"]["value"], 100)  # fmt: skip
    for row, entry in zip(rows, others, strict=True):
        size_bytes = entry.get("file_bytes", entry.get("size_bytes"))
        low, high = entry["comparison"]["ci95"]
        assert shows(
            " ".join(row[1:]), size_bytes / 1e6, fp32["size_bytes"] / size_bytes,
            100 * entry["accuracy"]["value"],
            -100 * entry["comparison"]["drop"], -100 * high, -100 * low,
            100 * entry.get("macs_kept", 1),
        ), row  # fmt: skip
    for row, entry in zip(read_table(told, "ms at"), [fp32, *others], strict=True):
        times = [
            number
            for dense, own in zip(fp32["latency"], entry["latency"], strict=True)
            for number in (
                [own["median_ms"]]
                if entry is fp32
                else [own["median_ms"], dense["median_ms"] / own["median_ms"]]
            )
        ]
        assert shows(" ".join(row[1:]), *times), row


@pytest.fixture(scope="module")
def confirming(finished):
    """The images that did not choose: the split made again by hand."""
    from common.images.loading import load_images
    from common.images.sources import open_source

    test = load_images(open_source(finished[1], bundled=True), "test", 120, 0)
    return test.rows(test.halves(0)[1])


def test_answers_are_of_the_files_on_images_that_did_not_choose(finished, confirming):
    """The predictions and the sizes, made again by hand."""
    _, folder, results = finished
    for answer in results["answers"]:
        path = folder / answer["file"]
        assert answer["file_bytes"] == path.stat().st_size
        with torch.inference_mode():
            predicted = load_int8(path)(normalize(confirming.images)).argmax(1)
        assert answer["accuracy"]["correct"] == int((predicted == confirming.labels).sum())
        assert answer["accuracy"]["total"] == len(confirming)


def test_the_fastest_has_fewer_channels_and_the_smallest_fewer_bytes(finished, tiny_weights):
    _, folder, results = finished
    size, speed, both = results["answers"]
    assert size["macs_kept"] < 1
    assert speed["macs_kept"] < 1
    assert both["macs_kept"] < 1
    assert size["file_bytes"] < results["models"][1]["size_bytes"]
    slim = load_model(folder / "resnet18_cifar10_slim.pth")
    widths, dense = (Widths.of(m.state_dict()) for m in (slim, load_model(tiny_weights)))
    assert sum(widths.inner) < sum(dense.inner)


def test_onnx_gives_the_same_classes(finished, confirming):
    _, folder, results = finished
    images = normalize(confirming.images)
    for answer in results["answers"]:
        run = load_onnx(folder / answer["onnx"]["file"])
        with torch.inference_mode():
            ours, theirs = load_int8(folder / answer["file"])(images), run(images)
        same = ours.argmax(1) == theirs.argmax(1)
        assert answer["onnx"]["agreement"] == float(same.double().mean())
        best = ours.topk(2).values
        decided = best[:, 0] - best[:, 1] > 0.1 * ours.std()  # on others a rounding decides
        assert decided.any()
        assert float(same[decided].double().mean()) > 0.9
        assert torch.allclose(theirs, ours, atol=0.3 * float(ours.std()))


def test_page_tells_the_same(finished):
    _, folder, results = finished
    page = check_page((folder / "report.html").read_text())
    assert page.images == [(folder / "frontier.png").read_bytes()]
    for answer in results["answers"]:
        assert f"{answer['size_ratio']:.1f}×" in page.text


def test_trained_networks_are_slimmer_and_are_coded_too(tiny_weights, tmp_path, monkeypatch):
    """Not asked for both: speed's networks are trained, and coded for size."""
    wide = Range(start=1 / 0.8, least=1 / 0.8, most=1 / 0.8, trials=1)
    monkeypatch.setattr(Slimmer, "search_range", lambda *_: wide)
    process = run_here(
        main, *QUICK, "--weights", tiny_weights, "--max-drop", "0.49", "--for", "size,speed",
        "--finetune-epochs", "1", "--finetune-images", "40", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_results(results, tmp_path / "out")
    (smallest, fastest), tried = results["answers"], results["tried"]
    passing = [entry for entry in tried if entry["passes"]]
    assert smallest["file_bytes"] == min(entry["file_bytes"] for entry in passing)
    trained, untrained = ([e for e in passing if e["trained"] == is_it] for is_it in (True, False))
    assert {entry["goal"] for entry in trained} == {"speed", "both"}
    reached = min(entry["macs_kept"] for entry in untrained if entry["goal"] == "speed")
    assert max(entry["macs_kept"] for entry in trained) < reached
    assert fastest["macs_kept"] == min(entry["macs_kept"] for entry in trained)


def test_a_killed_run_goes_on_where_it_was(finished, tiny_weights, tmp_path, monkeypatch):
    """Stopped before the second goal, resumed: the first goal's networks are not made again."""
    run = [*QUICK, "--weights", tiny_weights, "--max-drop", "0.49", "--for", "size,speed"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(answers._SEARCHES, "speed", stop)
        stopped = run_here(main, *run, "--output-dir", tmp_path / "out")
    assert stopped.returncode == 130
    assert [p.name for p in (tmp_path / "out").iterdir()] == [UNFINISHED_NAME]
    again = run_here(main, *run, "--output-dir", tmp_path / "out")
    assert again.returncode == 1
    assert "--resume" in again.stderr
    for change, what in ((("--seed", "1"), "the seed"), (("--batch-size", "7"), "the batch size")):
        other = run_here(main, *run, "--resume", *change, "--output-dir", tmp_path / "out")
        assert other.returncode == 1
        assert what in other.stderr
    with monkeypatch.context() as patch:  # coding would be needed for the first goal alone
        patch.setattr("pipeline.candidates.encode", stop)
        resumed = run_here(main, *run, "--resume", "--output-dir", tmp_path / "out", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "out" / UNFINISHED_NAME).exists()
    found, expected = without_times(json.loads(resumed.stdout)), without_times(finished[2])
    assert found["tried"] == [t for t in expected["tried"] if t["goal"] != "both"]
    for answer, whole in zip(found["answers"], expected["answers"], strict=False):
        whole.pop("onnx")
        assert answer == whole


def test_a_budget_that_nothing_meets_gives_the_nearest_and_exit_code_3(
    tiny_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr("common.search.budget.standard_error", lambda *_: 1.0)  # none to spare
    monkeypatch.setattr(answers, "run_trials", lambda make, where: [make(where.start)])
    arguments = ["--max-drop", "0", "--for", "size", "--output-dir", tmp_path / "out"]
    process = run_here(main, *QUICK, "--weights", tiny_weights, *arguments)
    assert process.returncode == 3, process.stderr
    assert "warning: --max-drop: a budget of 0 points leaves" in process.stderr
    assert "near chance; likely causes" in process.stderr  # a network that was never trained
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["answers"][0]["within_budget"]
    assert "not within the budget" in process.stdout
    assert load_int8(tmp_path / "out" / results["answers"][0]["file"])


def test_torchrun_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = run_here(main, *QUICK, "--output-dir", tmp_path / "out")
    assert process.returncode == 1
    assert process.stderr == "error: this script runs in one process: start without torchrun\n"
