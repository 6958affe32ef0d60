"""The search over many layers: its parts on tiny networks, and end to end."""

import json

import pytest
import torch
from check_results import check_model_search, check_results
from cifar import normalize
from processes import run_here
from resnet18 import weight_modules
from test_pruning import QUICK

from common.checkpoints.checkpoint import load_model
from common.measure.evaluate import predict
from common.network.size import describe_layers
from common.network.tracing import trace_network
from common.search.budget import split_test
from pruning.alone.scan import Scan
from pruning.pruning import main
from pruning.report import results as results_module
from pruning.report.plots import plot_model_search, search_title
from pruning.report.results import describe_found
from pruning.together import found as found_module
from pruning.together.allocation import GLOBAL, SENSITIVITY, global_masks
from pruning.together.found import Found, best_of, search_all, search_with
from pruning.together.search import Method, ModelSearch


def test_halves_share_no_image_and_are_shuffled(random_images):
    test = random_images(40)
    right = torch.arange(40) % 3 > 0
    chosen, held_out = split_test(test, right, seed=1)
    rows = [(test.images == image).flatten(1).all(1).nonzero().item()
            for half in (chosen, held_out) for image in half.images.images]  # fmt: skip
    assert sorted(rows) == list(range(40))
    assert rows[:20] != sorted(rows[:20])
    assert torch.equal(torch.cat([chosen.dense_correct, held_out.dense_correct]), right[rows])


@pytest.fixture
def search(tiny_model, random_images):
    test = random_images(40)
    with torch.inference_mode():
        correct = tiny_model(normalize(test.images)).argmax(1) == test.labels
    scan = Scan(tiny_model, test, [], [], 4, False)
    return ModelSearch(scan, correct, "conv", 0.1, 0, random_images(16, seed=5))


def test_prunes_a_copy_within_the_scope(search):
    before = {name: tensor.clone() for name, tensor in search.model.state_dict().items()}
    pruned = search.prune(Method(GLOBAL, False), 0.5)
    convolutions = {n: before[f"{n}.weight"] for n in weight_modules(pruned) if n != "linear"}
    masks = global_masks(convolutions, 0.5)
    for name, layer in weight_modules(pruned).items():
        dense = before[f"{name}.weight"]
        expected = dense * masks[name] if name != "linear" else dense
        assert torch.equal(layer.weight, expected), name
    assert all(torch.equal(t, before[name]) for name, t in search.model.state_dict().items())


def test_where_nothing_goes_it_is_the_dense_network(search):
    """Its statistics were re-estimated all the same, and nothing had judged what that costs."""
    pruned = search.prune(Method(GLOBAL, True), 0.0)
    state = search.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())


def test_entry_is_what_plain_passes_measure(search):
    network = trace_network(search.model, (3, 32, 32))
    method, layers = Method(GLOBAL, True), describe_layers(search.model, network)
    found = search_with(search, method)
    entry = describe_found(search, found)
    pruned = search.prune(method, found.sparsity)
    held = search.held_out.images
    assert torch.equal(found.correct, predict(pruned, held, 16) == held.labels)
    assert entry["accuracy"]["total"] == len(held)
    kept = sum(
        layer["macs"] * float((weight_modules(pruned)[layer["name"]].weight != 0).float().mean())
        for layer in layers
    )
    assert entry["macs_kept"] == pytest.approx(kept / sum(layer["macs"] for layer in layers))
    kept = [step["sparsity"] for step in entry["steps"] if step["kept"]]
    assert entry["max_sparsity"] == max(kept, default=0.0)


def test_all_of_a_curve_is_on_the_same_images(search, monkeypatch):
    """Two points of it were on all held-out images, the others on the first 2,000."""
    monkeypatch.setattr(found_module, "CURVE_IMAGES", 12)
    monkeypatch.setattr(results_module, "CURVE_IMAGES", 12)
    found = search_with(search, Method(GLOBAL, False))
    entry = describe_found(search, found)
    first = search.held_out.images.rows(slice(12))
    for sparsity, accuracy in entry["curve"]:
        pruned = search.prune(found.method, sparsity)
        assert accuracy == int((predict(pruned, first, 16) == first.labels).sum()) / 12
    assert entry["curve"][0][0] == 0
    assert found.sparsity in [sparsity for sparsity, _ in entry["curve"]]
    assert len(found.correct) == 20


def test_equals_are_told_apart_by_the_half_that_chooses(search):
    """The held-out half had the say, and so was none."""
    chosen = search.budget.choosing.images
    better = search.model
    worse = search.prune(Method(GLOBAL, False), 0.99)

    def made(model, right_on_held_out):
        correct = torch.arange(20) < right_on_held_out
        return Found(Method(GLOBAL, False), 0, 0.5, model, correct, {}, [])

    chosen.labels[:] = predict(better, chosen, 16)
    assert not torch.equal(predict(worse, chosen, 16), chosen.labels)
    pair = [made(worse, 20), made(better, 0)]
    assert best_of(search, pair) is best_of(search, pair[::-1]) is pair[1]


def test_every_method_gets_its_row(search, tmp_path):
    found = search_all(search)
    entries = [describe_found(search, one) for one in found]
    rows = [(entry["allocation"], entry["recalibrated"]) for entry in entries]
    assert rows == [(SENSITIVITY, False), (SENSITIVITY, True)]
    for entry in entries:
        check_model_search(json.loads(json.dumps(entry)))
    best = best_of(search, found)
    assert best.sparsity == max(one.sparsity for one in found)
    plot_model_search(entries, 0.1, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_plot_promises_no_more_than_the_held_out_images_confirm():
    held, lost = (
        {
            "scope": "all",
            "allocation": SENSITIVITY,
            "max_sparsity": share,
            "within_tolerance": within,
        }
        for share, within in ((0.758, True), (0.866, False))
    )
    assert search_title([held, lost], 0.02).startswith("75.8 % of the weights can go")
    assert search_title([lost], 0.02).startswith("0.0 % of the weights can go")


@pytest.fixture(scope="module")
def finished(tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--layers", "linear", "--scope", "all"]
    arguments += ["--tolerance", "0.3", "--weights", tiny_weights]
    return run_here(main, *QUICK, *arguments, "--output-dir", folder), folder


def test_run_keeps_the_contract_and_saves_the_best(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert [entry["allocation"] for entry in results["model_search"]] == ["sensitivity"]
    *lines, _ = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    saved = results["model_saved"]
    state = load_model(folder / results["artifacts"]["model"]).state_dict()
    linear = load_model(folder / results["artifacts"]["linear_model"]).state_dict()
    assert int(linear["linear.weight"].count_nonzero()) == results["linear_search"]["kept_weights"]
    assert torch.equal(linear["linear.bias"], state["linear.bias"])
    for name in (results["artifacts"]["model"], results["artifacts"]["linear_model"]):
        assert name in process.stdout
    weights = [state[f"{layer['name']}.weight"] for layer in results["layers"]]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert 1 - kept / sum(weight.numel() for weight in weights) == pytest.approx(
        saved["sparsity"], abs=21 / 6720
    )
    assert "model_search.png" in results["artifacts"]["plots"]
