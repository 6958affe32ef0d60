"""The search over many layers: its parts on tiny networks, and end to end."""

import json

import pytest
import torch
from check_results import check_model_search, check_results
from hypothesis import given
from hypothesis import strategies as st
from test_pruning import QUICK, run

from common.checkpoint import load_model
from common.data import normalize
from common.model import prunable_layers
from common.size import describe_layers
from pruning import model_results, model_search
from pruning.allocation import ALLOCATIONS, RANDOM, uniform_masks, weights_in_scope
from pruning.artifacts import load_packed
from pruning.model_plots import plot_model_search
from pruning.model_search import LARGEST_LEVEL, LEVELS, Method, ModelSearch


@given(st.integers(0, LARGEST_LEVEL))
def test_finds_the_level_on_falling_curves(largest):
    tried = []

    def is_kept(level):
        tried.append(level)
        return level <= largest

    assert model_search.largest_level(is_kept) == largest
    assert len(tried) == len(set(tried)) <= 13
    assert 0 not in tried


@given(st.sets(st.integers(1, LARGEST_LEVEL)))
def test_any_answer_was_kept(kept):
    found = model_search.largest_level(kept.__contains__)
    assert found == 0 or found in kept
    compressed = [level for level in kept if level in {LEVELS - LEVELS // t for t in (2, 4, 8, 16)}]
    assert found >= max(compressed, default=0)


def test_clearance_is_the_paired_z_score():
    dense = torch.tensor([True] * 90 + [False] * 10)
    pruned = torch.tensor([False] * 6 + [True] * 84 + [True] * 2 + [False] * 8)
    # 6 lost, 2 gained: 4 of the 10 that a tolerance of 10 points allows; variance 8 - 16 / 100.
    expected = (10 - 4) / (8 - 0.16) ** 0.5
    assert model_search.clearance(dense, pruned, 0.1) == pytest.approx(expected)
    assert model_search.clearance(dense, dense, 0.0) == 0


def test_halves_share_no_image_and_are_shuffled(random_images):
    test = random_images(40)
    right = torch.arange(40) % 3 > 0
    chosen, held_out = model_search.split_test(test, right, seed=1)
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
    found = ModelSearch.prepare(tiny_model, "conv", test, correct, 0.1, 0, fast=False)
    found.training = random_images(16, seed=5).images
    return found


def test_prunes_a_copy_within_the_scope(search):
    before = {name: tensor.clone() for name, tensor in search.model.state_dict().items()}
    pruned = search.prune(Method("uniform", False), 0.5)
    masks = uniform_masks(weights_in_scope(search.model, "conv"), 0.5)
    for name, layer in prunable_layers(pruned).items():
        dense = before[f"{name}.weight"]
        expected = dense * masks[name] if name != "linear" else dense
        assert torch.equal(layer.weight, expected), name
    assert all(torch.equal(t, before[name]) for name, t in search.model.state_dict().items())


def test_entry_is_what_plain_passes_measure(search):
    method, layers = Method("global", True), describe_layers(search.model)
    entry = model_results.run_method(search, method, layers).entry
    pruned = search.prune(method, entry["max_sparsity"])
    held_out = search.held_out.images
    correct = search.find_correct(search.held_out, pruned)
    assert entry["accuracy"]["correct"] == int(correct.sum())
    assert entry["accuracy"]["total"] == len(held_out)
    kept = sum(
        layer.macs * float((prunable_layers(pruned)[layer.name].weight != 0).float().mean())
        for layer in layers
    )
    assert entry["macs_kept"] == pytest.approx(kept / sum(layer.macs for layer in layers))
    assert [step["kept"] for step in entry["steps"]].count(True) >= (entry["max_sparsity"] > 0)


def test_every_method_gets_its_row(search, tmp_path):
    layers = describe_layers(search.model)
    found = model_results.run_all(search, ALLOCATIONS, layers)
    entries = [one.entry for one in found]
    rows = [(entry["allocation"], entry["recalibrated"]) for entry in entries]
    expected = [(name, recalibrated) for recalibrated in (False, True) for name in ALLOCATIONS]
    assert rows == [*expected, (RANDOM, False)]
    for entry in entries:
        check_model_search(json.loads(json.dumps(entry)))
    best = model_results.best_of(found)
    assert best.entry["max_sparsity"] == max(
        entry["max_sparsity"] for entry in entries if entry["allocation"] != RANDOM
    )
    plot_model_search(entries, 0.1, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--layers", "linear", "--scope", "all", "--allocation", "global"]
    arguments += ["--tolerance", "0.3"]
    return run(*QUICK, *arguments, "--output-dir", folder), folder


def test_run_keeps_the_contract_and_saves_the_best(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    assert [entry["allocation"] for entry in results["model_search"]] == ["global", "random"]
    *lines, _ = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    saved = results["model_saved"]
    state = load_model(folder / results["artifacts"]["model"]).state_dict()
    packed = load_packed(folder / results["artifacts"]["packed"])
    assert all(torch.equal(packed[name], tensor) for name, tensor in state.items())
    weights = [state[f"{layer['name']}.weight"] for layer in results["layers"]]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert 1 - kept / sum(weight.numel() for weight in weights) == pytest.approx(
        saved["sparsity"], abs=1e-6
    )
    assert "model_search.png" in results["artifacts"]["plots"]
