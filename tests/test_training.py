import copy
import json
from dataclasses import replace

import pytest
import torch
from cifar import normalize
from processes import run_here, run_together
from resnet18 import ResNet18, Widths
from torch import nn

import common.inputs  # noqa: F401 - takes the true ResNet, before a test replaces it
from common.checkpoints import resnet
from common.checkpoints.checkpoint import load_model, save_checkpoint
from common.command.cli import UserError
from common.files.untrusted import read_untrusted
from common.images.cifar import bundled_source
from common.images.loading import load_images
from common.machine.workers import Workers
from common.measure.evaluate import measure_accuracy, predict
from tests.check_results import check_results
from tests.printed import read_table, shows
from training.loop.fit import EpochSummary, TrainingState, fit, make_optimizer
from training.recipe import Recipe
from training.record import CHECKPOINT_NAME, EpochRecorder, split_held_out, tell
from training.training import main

CPU = torch.device("cpu")
ALONE = Workers(CPU)
TINY = (4, 8, 8, 8)
RECIPE = Recipe(epochs=3, batch_size=20, learning_rate=0.05, cutmix=0.5, jitter=0.5)
QUICK = (
    "--bundled", "--train-images", "30", "--held-out-images", "10", "--test-images", "10",
    "--epochs", "2", "--batch-size", "10", "--threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return load_images(bundled_source(), "train", 600, seed=0)


def tiny_network(shape: object = None):
    return ResNet18(Widths(TINY))


def start(recipe=RECIPE, channels=TINY, seed=0):
    torch.manual_seed(seed)
    return TrainingState.start(ResNet18(Widths(channels)), recipe, CPU)


def make_recorder(folder, held_out=None):
    return EpochRecorder(held_out, RECIPE.epochs, folder / CHECKPOINT_NAME)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- the loop ------------------------------------------------------------------------------------


def test_training_learns(images):
    recipe = replace(RECIPE, epochs=5, learning_rate=0.1, cutmix=0, jitter=0, warmup=0.2)
    train, held_out = split_held_out(images, 200)
    state, summaries = start(recipe, (8, 16, 16, 16)), []
    fit(state, train, recipe, 0, ALONE, after_epoch=lambda _, summary: summaries.append(summary))
    accuracy = measure_accuracy(predict(state.model.eval(), held_out) == held_out.labels)
    # 37 or more of 200 right by chance, at 0.1 each: probability below 1e-4.
    assert accuracy.correct >= 37
    assert summaries[-1].loss < summaries[0].loss < 2.6


def test_resumed_equals_unbroken_to_the_bit(images, tmp_path):
    held_out, images = (split.rows(slice(100)) for split in split_held_out(images, 100))
    unbroken = start()
    fit(unbroken, images, RECIPE, 7, ALONE)

    class KilledError(Exception):
        pass

    recorder = make_recorder(tmp_path, held_out)

    def save_then_die(state, summary):
        recorder(state, summary)
        if summary.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        fit(start(), images, RECIPE, 7, ALONE, after_epoch=save_then_die)
    resumed = start(seed=99)  # what it starts from must not matter
    again = make_recorder(tmp_path)
    again.resume(resumed)
    assert (resumed.epochs_done, again.rows) == (2, recorder.rows)
    fit(resumed, images, RECIPE, 7, ALONE)
    assert same(resumed.model, unbroken.model)
    assert not same(start().model, unbroken.model)


def test_a_step_equals_torchs_sgd_by_hand(images):
    recipe = Recipe(epochs=1, batch_size=600, learning_rate=0.05, crop_padding=0, flip=False)
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


def test_only_weights_decay():
    optimizer = make_optimizer(ResNet18(Widths(TINY)), RECIPE)
    decays = {(p.ndim > 1): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {True: RECIPE.weight_decay, False: 0.0}


def test_a_mask_is_held_after_every_step(images):
    state = start()
    mask = torch.rand_like(state.model.conv1.weight) < 0.5

    def prune(model):
        with torch.no_grad():
            model.conv1.weight.mul_(mask)

    prune(state.model)
    fit(state, images, replace(RECIPE, epochs=1), 0, ALONE, after_step=prune)
    assert not state.model.conv1.weight[~mask].any()
    assert state.model.conv1.weight[mask].all()


def test_another_loss_takes_the_place_of_the_labels(images):
    state = start()
    before = state.model.linear.bias.detach().clone()

    def to_class_three(batch, logits, targets):
        assert len(batch) == len(logits) == len(targets) == RECIPE.batch_size
        return -logits.log_softmax(1)[:, 3].mean()

    fit(state, images, replace(RECIPE, epochs=1), 0, ALONE, loss=to_class_three)
    assert (state.model.linear.bias - before).argmax() == 3
    assert (predict(state.model.eval(), images) == 3).all()


def test_divergence_is_told_in_one_line(images):
    recipe = replace(RECIPE, learning_rate=1e12, warmup=0.0)
    with pytest.raises(UserError, match="lower learning rate"):
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


# --- the recorder --------------------------------------------------------------------------------


def test_every_epoch_is_measured_and_saved(images, tmp_path):
    train, held_out = split_held_out(images, 100)
    recorder, accuracies = make_recorder(tmp_path, held_out), []

    def watch(state, summary):
        recorder(state, summary)
        make_recorder(tmp_path).resume(start())
        correct = predict(state.model.eval(), held_out) == held_out.labels
        accuracies.append(correct.double().mean().item())

    fit(start(), train, RECIPE, 0, ALONE, after_epoch=watch)
    assert [row.epoch for row in recorder.rows] == [1, 2, 3]
    assert [row.held_out_accuracy for row in recorder.rows] == accuracies


def test_where_nothing_was_saved_nothing_is_resumed(tmp_path):
    state = start()
    make_recorder(tmp_path).resume(state)
    assert state.epochs_done == 0
    assert same(state.model, start().model)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)


def edit(change):
    def apply(path):
        content = read_untrusted(path)
        change(content)
        save_checkpoint(content, path)

    return apply


def put(name, value):
    return edit(lambda content: content["tensors"].update({name: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "truncated"),
        (flip_bytes, "damaged \\(checksum of .* differs\\)"),
        (put("model.conv1.weight", torch.full((4, 3, 3, 3), torch.nan)), "conv1.weight holds NaN"),
        (put("momentum.linear.bias", torch.zeros(11)), "momentum.linear.bias is .*shape \\(11,\\)"),
        (put("model.bn1.bias", torch.zeros(4, dtype=torch.float64)), "bn1.bias is torch.float64"),
        (put("model.bn9.bias", torch.zeros(4)), "model.bn9.bias is unexpected"),
        (put("model.bn1.bias", "4"), "damaged"),
        (edit(lambda content: content["tensors"].pop("model.bn1.bias")), "bn1.bias is missing"),
        (edit(lambda content: content["rows"].append(3)), "damaged"),
        (edit(lambda content: content["rows"][0].update(epoch=7)), "epochs are out of order"),
        (edit(lambda content: content.pop("rows")), "damaged \\('rows'\\)"),
        (lambda path: torch.save([1], path), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage, message, images, tmp_path):
    recorder = make_recorder(tmp_path, images.rows(slice(10)))
    recorder(start(), EpochSummary(1, 0.1, 2.0, 0.2, 1.0))
    damage(recorder.checkpoint)
    left, resumed = recorder.checkpoint.read_bytes(), start(seed=9)
    with pytest.raises(UserError, match=f"{message}.*; start anew with --overwrite instead"):
        make_recorder(tmp_path).resume(resumed)
    assert same(resumed.model, start(seed=9).model)
    assert resumed.epochs_done == 0
    assert recorder.checkpoint.read_bytes() == left


# --- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "ResNet", tiny_network)
        assert main([*QUICK, "--output-dir", str(folder), "--quiet"]) == 0
    torch.set_num_threads(threads)
    return folder, json.loads((folder / "results.json").read_text())


def test_a_run_writes_weights_that_load_and_results_that_keep_the_contract(finished):
    folder, results = finished
    check_results(results, folder)
    model = load_model(folder / "resnet18_cifar10.pth")
    test = load_images(bundled_source(), "test", 10, seed=0)
    correct = int((predict(model, test) == test.labels).sum())
    assert correct == results["accuracy"]["correct"]
    parameters = sum(weight.numel() for weight in model.parameters())
    assert results["parameters"] == results["network"]["parameters"] == parameters
    assert results["network"]["family"] == "resnet18-cifar"
    assert results["network"]["layers"] == 21
    assert results["data"] == {
        "source": "bundled", "train_images": 20, "held_out_images": 10, "test_images": 10,
        **test.describe(),
    }  # fmt: skip
    names = {"curves.png", "epochs.csv", "resnet18_cifar10.pth", "results.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_every_number_is_that_of_results_json(finished):
    folder, results = finished
    text = tell(results).text(folder)
    entries = [results["held_out"], results["accuracy"]]
    for row, entry in zip(read_table(text, "accuracy (FP32)"), entries, strict=True):
        low, high = (100 * limit for limit in entry["ci95"])
        assert shows(" ".join(row[1:]), 100 * entry["value"], low, high, entry["total"]), row
    classes = [entry["value"] for entry in results["per_class"].values()]
    by_class = next(line for line in text.splitlines() if line.startswith("By class"))
    assert shows(by_class, 100 * min(classes), 100 * max(classes))


def test_an_interrupted_run_resumes_to_the_same_file(finished, tmp_path, monkeypatch, capsys):
    take_in = EpochRecorder.__call__

    def take_in_then_stop(recorder, state, summary):
        take_in(recorder, state, summary)
        raise KeyboardInterrupt

    command = [*QUICK, "--output-dir", str(tmp_path)]
    monkeypatch.setattr(resnet, "ResNet", tiny_network)
    with monkeypatch.context() as patch:
        patch.setattr(EpochRecorder, "__call__", take_in_then_stop)
        assert main(command) == 130
    assert "kept: to go on, repeat the command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert main([*command, "--epochs", "3", "--resume"]) == 1
    assert "a run that differs in epochs" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "resumed after epoch 1 of 2" in capsys.readouterr().err
    name = "resnet18_cifar10.pth"
    assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert (tmp_path / "epochs.csv").read_text().count("\n") == 3
    assert not (tmp_path / "unfinished").exists()


def test_two_processes_train_the_network_of_one(tmp_path, monkeypatch):
    # Without batch norm, whose statistics are of each process's images, all is the same but sums.
    layers = (nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.setattr(resnet, "ResNet", lambda shape: nn.Sequential(*layers))
    # CutMix takes the next image of a process's share, so it depends on their number.
    arguments = [*QUICK, "--cutmix", 0, "--learning-rate", 0.01, "--output-dir"]
    done, second = run_together(main, *arguments, tmp_path / "2", output=tmp_path / "told")
    assert (done.returncode, second.returncode) == (0, 0), done.stderr + second.stderr
    assert second.stdout == ""
    alone = run_here(main, *arguments, tmp_path / "1")
    assert alone.returncode == 0, alone.stderr
    states = []
    for told, count in ((alone, 1), (done, 2)):
        folder = tmp_path / str(count)
        assert told.stdout.count("written to") == 1
        results = json.loads((folder / "results.json").read_text())
        check_results(results, folder)
        assert results["processes"] == count
        states.append(torch.load(folder / "resnet18_cifar10.pth"))
    assert states[0].keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    for name, expected in states[0].items():
        assert torch.allclose(states[1][name], expected, atol=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out-images", "30"], "leave none"),
        (["--train-images", "2001"], "only 2,000"),
        (["--test-images", "10001"], "only 10,000"),
        (["--batch-size", "21"], "only 20 training images"),
    ],
)
def test_bad_requests_end_in_one_line(arguments, message, tmp_path, capsys):
    assert main([*QUICK, *arguments, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--preset gpu", "--start-size 16", "--precision fp32"])
def test_flags_that_would_do_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flag.split())
    assert stop.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
