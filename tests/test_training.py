import copy
import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoint import load_model
from common.cli import UserError
from common.data import Cifar10, load_images, normalize
from common.evaluate import measure_accuracy, predict
from common.model import ResNet18
from common.sources import bundled_source
from common.workers import Workers
from tests.check_results import check_results
from tests.printed import read_table, shows
from training.averaging import averaged_model
from training.experiment import EpochMeter, choose, split_held_out
from training.fit import fit
from training.journal import EpochRow, Journal, describe_settings
from training.recipe import Recipe
from training.state import TrainingState, make_optimizer
from training.tables import format_results
from training.training import main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "training" / "training.py"
CPU = torch.device("cpu")
ALONE = Workers(CPU)
TINY = (4, 8, 8, 8)
RECIPE = Recipe(
    epochs=3, batch_size=20, learning_rate=0.05, cutout=8, cutmix=0.5, jitter=0.5, start_size=16,
    full_size_from=0.5, ema_decay=0.9, precision="fp32",
)  # fmt: skip
# The whole network on images of 8 pixels: the quickest end-to-end run.
QUICK = (
    "--bundled", "--train-images", "60", "--held-out-images", "20", "--test-images", "10",
    "--preset", "cpu", "--epochs", "2", "--batch-size", "20", "--start-size", "8",
    "--full-size-from", "1", "--precision", "fp32", "--threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return load_images(bundled_source(), "train", 600, seed=0)


def start(recipe=RECIPE, channels=TINY, seed=0):
    torch.manual_seed(seed)
    return TrainingState.start(ResNet18(stage_channels=channels), recipe, CPU)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- the loop ------------------------------------------------------------------------------------


def test_one_epoch_learns():
    images = load_images(bundled_source(), "train", 1000, seed=0)
    recipe = replace(
        RECIPE, epochs=1, batch_size=10, cutout=0, cutmix=0, jitter=0, start_size=32, warmup=0.2
    )
    train, held_out = split_held_out(images, 200)
    state, summaries = start(recipe, (16, 32, 32, 32)), []
    fit(state, train, recipe, 0, ALONE, after_epoch=lambda _, summary: summaries.append(summary))
    accuracy = measure_accuracy(predict(state.model.eval(), held_out) == held_out.labels)
    # 37 or more of 200 right by chance, at 0.1 each: probability below 1e-4.
    assert accuracy.correct >= 37
    longer = replace(recipe, epochs=2)
    fit(state, train, longer, 0, ALONE, after_epoch=lambda _, s: summaries.append(s))
    assert summaries[1].loss < summaries[0].loss < 2.6


def test_resumed_equals_unbroken_to_the_bit(images, tmp_path):
    settings = describe_settings(RECIPE, 7, images)
    unbroken = start()
    fit(unbroken, images, RECIPE, 7, ALONE)

    class KilledError(Exception):
        pass

    journal = Journal(tmp_path, settings)
    row = {"held_out_accuracy": 0.5, "averaged_accuracy": 0.5}

    def save_then_die(state, summary):
        journal.rows.append(EpochRow(**vars(summary), **row))
        journal.save(state)
        if summary.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        fit(start(), images, RECIPE, 7, ALONE, after_epoch=save_then_die)
    resumed = start(seed=99)  # what it starts from must not matter
    again = Journal(tmp_path, settings)
    again.resume(resumed)
    assert (resumed.epochs_done, len(again.rows)) == (2, 2)
    fit(resumed, images, RECIPE, 7, ALONE)
    assert same(resumed.model, unbroken.model)
    assert same(resumed.average, unbroken.average)
    assert not same(start().model, unbroken.model)


def test_a_step_equals_torchs_sgd_by_hand(images):
    recipe = Recipe(
        epochs=1, batch_size=600, learning_rate=0.05, crop_padding=0, flip=False, precision="fp32"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    reference = copy.deepcopy(model)
    state = TrainingState.start(model, recipe, CPU)
    fit(state, images, recipe, 0, ALONE)
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    loss(reference(normalize(images.images)), images.labels).backward()
    weight, bias = reference[1].weight, reference[1].bias
    rate, nesterov = recipe.learning_rate_at(0.5), 1 + recipe.momentum  # of a first step
    decayed = weight.grad + recipe.weight_decay * weight
    torch.testing.assert_close(model[1].weight, weight - rate * nesterov * decayed)
    torch.testing.assert_close(model[1].bias, bias - rate * nesterov * bias.grad)
    # After one step the average lies 2/11 of the way from the new weights to the first ones.
    expected = torch.lerp(reference[1].weight, model[1].weight, 1 - 2 / 11)
    torch.testing.assert_close(state.average[1].weight, expected)


def test_only_weights_decay():
    optimizer = make_optimizer(ResNet18(stage_channels=TINY), RECIPE)
    decays = {(p.ndim > 1): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {True: RECIPE.weight_decay, False: 0.0}


def test_a_mask_held_after_every_step_stays_in_the_average_too(images):
    state = start()
    mask = torch.rand_like(state.model.conv1.weight) < 0.5

    def prune(model):
        with torch.no_grad():
            model.conv1.weight.mul_(mask)

    prune(state.model)
    prune(state.average)
    fit(state, images, replace(RECIPE, epochs=1), 0, ALONE, after_step=prune)
    for model in (state.model, averaged_model(state, images, RECIPE, 0)):
        assert not model.conv1.weight[~mask].any()
        assert model.conv1.weight[mask].all()


def test_averaged_statistics_are_those_of_the_averaged_weights(images):
    recipe = replace(RECIPE, cutout=0, cutmix=0, jitter=0, crop_padding=0, flip=False)
    state = start(recipe)
    images = Cifar10(images.images[::2], images.labels[::2])  # all in one batch
    fit(state, images, replace(recipe, epochs=1), 0, ALONE)
    model = averaged_model(state, images, recipe, 0)
    seen = []
    model.conv1.register_forward_hook(lambda *call: seen.append(call[2]))
    predict(model, images, 600)
    stem = torch.cat(seen)
    assert torch.allclose(model.bn1.running_mean, stem.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model.bn1.running_var, stem.var((0, 2, 3)), rtol=1e-3)
    assert not torch.allclose(model.bn1.running_mean, state.average.bn1.running_mean, atol=1e-2)


def test_divergence_is_told_in_one_line(images):
    recipe = replace(RECIPE, learning_rate=1e12, warmup=0.0)
    with pytest.raises(UserError, match="lower --learning-rate"):
        fit(start(recipe), images, recipe, 0, ALONE)


def test_a_batch_must_fit_the_images_and_the_processes(images):
    with pytest.raises(UserError, match="a batch of 601 from only 600"):
        fit(start(), images, replace(RECIPE, batch_size=601), 0, ALONE)
    with pytest.raises(UserError, match="3 processes cannot share a batch of 20"):
        fit(start(), images, RECIPE, 0, Workers(CPU, 0, 3))


# --- choices -------------------------------------------------------------------------------------


def test_held_out_images_are_balanced_and_not_trained_on(images):
    train, held_out = split_held_out(images, 100)
    assert torch.equal(torch.bincount(held_out.labels), torch.full((10,), 10))
    trained = {image.numpy().tobytes() for image in train.images}
    assert not trained & {image.numpy().tobytes() for image in held_out.images}
    assert len(train) + len(held_out) == 600
    with pytest.raises(UserError, match="leave none"):
        split_held_out(images, 600)


def test_the_better_of_average_and_last_weights_is_chosen(images):
    train, held_out = split_held_out(images, 200)
    state = start()
    fit(state, train, replace(RECIPE, epochs=1), 0, ALONE)
    with torch.no_grad():
        state.model.linear.weight.zero_()  # always one class: 20 of 200
        state.model.linear.bias.zero_()
        state.model.linear.bias[0] = 1
    _, entry = choose(state, train, held_out, RECIPE, 0)
    assert entry["held_out"]["last"]["correct"] == 20
    best = max(entry["held_out"], key=lambda name: entry["held_out"][name]["correct"])
    assert entry["chosen"] == best


def test_the_meter_notes_every_epoch_and_saves_as_often_as_asked(images, tmp_path):
    train, held_out = split_held_out(images, 100)
    journal = Journal(tmp_path, {})
    journal.start(overwrite=False)
    meter = EpochMeter(train, held_out, RECIPE, 0, journal, save_every=2)
    saved = []

    def watch(state, summary):
        meter(state, summary)
        rows = (tmp_path / "unfinished" / "epochs.csv") if journal.checkpoint.exists() else None
        saved.append(len(rows.read_text().splitlines()) - 1 if rows else 0)

    fit(start(), train, RECIPE, 0, ALONE, after_epoch=watch)
    assert saved == [0, 2, 3]
    with (tmp_path / "unfinished" / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["image_size"] for row in rows] == ["16", "24", "32"]
    assert all(0 <= float(row["held_out_accuracy"]) <= 1 for row in rows)


# --- the journal ---------------------------------------------------------------------------------


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(tmp_path):
    state = start()
    journal = Journal(tmp_path, {"seed": 0})
    with pytest.raises(UserError, match="nothing to resume"):
        journal.resume(state)
    journal.save(state)
    with pytest.raises(UserError, match="--resume or discard it with --overwrite"):
        Journal(tmp_path, {"seed": 0}).start(overwrite=False)
    with pytest.raises(UserError, match="made with seed = 0, not 1"):
        Journal(tmp_path, {"seed": 1}).resume(state)
    journal.checkpoint.write_bytes(journal.checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        journal.resume(state)
    Journal(tmp_path, {"seed": 1}).start(overwrite=True)
    assert not journal.folder.exists()


# --- end to end ----------------------------------------------------------------------------------


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(SCRIPT, *QUICK, "--output-dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_run_writes_weights_that_load_and_results_that_keep_the_contract(finished):
    folder, results = finished
    assert results == json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    model = load_model(folder / "resnet18_cifar10.pth")
    test = load_images(bundled_source(), "test", 10, seed=0)
    correct = int((predict(model, test) == test.labels).sum())
    assert correct == results["accuracy"]["correct"]
    assert results["data"] == {
        "source": "bundled", "train_images": 40, "held_out_images": 20, "test_images": 10,
    }  # fmt: skip
    names = {"curves.png", "epochs.csv", "resnet18_cifar10.pth", "results.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_every_number_is_that_of_results_json(finished):
    folder, results = finished
    text = format_results(results, folder)
    entries = [results["held_out"]["last"], results["held_out"]["averaged"], results["accuracy"]]
    for row, entry in zip(read_table(text, "accuracy (FP32)"), entries, strict=True):
        low, high = (100 * limit for limit in entry["ci95"])
        assert shows(" ".join(row[1:]), 100 * entry["value"], low, high, entry["total"]), row
    classes = [entry["value"] for entry in results["per_class"].values()]
    by_class = next(line for line in text.splitlines() if line.startswith("test, by class"))
    assert shows(by_class, 100 * min(classes), 100 * max(classes))


def test_a_killed_run_resumes_to_the_same_file(finished, tmp_path):
    command = [sys.executable, SCRIPT, *QUICK, "--output-dir", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    checkpoint = tmp_path / "unfinished" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
    assert not (tmp_path / "results.json").exists()
    done = run(SCRIPT, *QUICK, "--output-dir", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch 1 of 2" in done.stderr
    name = "resnet18_cifar10.pth"
    assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert (tmp_path / "epochs.csv").read_text().count("\n") == 3
    assert not checkpoint.parent.exists()


def test_two_processes_train_one_network(tmp_path):
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               SCRIPT, *QUICK, "--output-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    check_results(results, tmp_path)
    assert results["processes"] == 2


def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch):
    # Without batch norm, whose statistics are of each process's images, all is the same but sums.
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "from torch import nn\n"
        "from common.data import Cifar10\n"
        "from common.workers import join_workers\n"
        "from training.fit import fit\n"
        "from training.state import TrainingState\n"
        "from training.recipe import Recipe\n"
        "recipe = Recipe(epochs=2, batch_size=20, learning_rate=0.01, cutout=8, precision='fp32')\n"
        "pixels = torch.Generator().manual_seed(0)\n"
        "images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=pixels)\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))\n"
        "model(torch.zeros(1, 3, 32, 32))\n"
        "with join_workers(torch.device('cpu')) as workers:\n"
        "    state = TrainingState.start(model, recipe, workers.device)\n"
        "    fit(state, Cifar10(images, torch.arange(100) % 10), recipe, 0, workers)\n"
        "    torch.save(model.state_dict(), f'{sys.argv[1]}-{workers.rank}.pt')\n"
    )
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "one")])
    runpy.run_path(str(program))
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               program, tmp_path / "two", PYTHONPATH=str(ROOT))  # fmt: skip
    assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1")]
    for name, expected in states[0].items():
        assert torch.allclose(states[1][name], expected, atol=1e-5), name
        assert torch.equal(states[1][name], states[2][name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out-images", "60"], "leave none"),
        (["--train-images", "2001"], "only 2000"),
        (["--test-images", "10001"], "only 10000"),
        (["--batch-size", "41"], "only 40 training images"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_requests_end_in_one_line(arguments, message, tmp_path, capsys):
    assert main([*QUICK, *arguments, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["7", "10", "36", "big"])
def test_sizes_that_do_not_fit_the_network_are_usage_errors(size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--start-size", size])
    assert stop.value.code == 2
    assert "--start-size" in capsys.readouterr().err
