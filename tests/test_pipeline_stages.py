"""The stages on tiny networks: what they measure, held against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import prune as torch_prune

from common import checkpoint
from common.cli import UserError
from common.data import normalize
from common.latency import Timing
from common.model import ResNet18, prunable_layers
from common.output import OutputFolder
from pipeline import stages
from quantization import artifact, conversion, engines
from quantization.settings import Settings

TINY = (4, 8, 8, 8)
SETTINGS = Settings(engines.candidate_engines()[0], observer="minmax")


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    for module in (conversion, checkpoint):
        monkeypatch.setattr(module, "ResNet18", lambda: ResNet18(stage_channels=TINY))
    # A fresh process would know nothing of tiny networks.
    monkeypatch.setattr(artifact, "logits_in_fresh_process", load_and_run)


def load_and_run(path, images, threads):
    return artifact.load_int8(path)(images)


@pytest.fixture
def bench(tmp_path, random_images):
    with OutputFolder(tmp_path / "out") as folder:
        yield stages.Bench(folder, random_images(40), random_images(32, 1), 16)


@pytest.mark.parametrize("allocation", stages.ALLOCATIONS)
def test_pruning_is_torchs_own(tiny_model, allocation):
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    pruned = stages.prune(tiny_model, 0.7, allocation)
    assert all(torch.equal(t, before[name]) for name, t in tiny_model.state_dict().items())
    layers = [(layer, "weight") for layer in prunable_layers(tiny_model).values()]
    if allocation == "global":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.7)
    else:
        for layer, name in layers:
            torch_prune.l1_unstructured(layer, name, amount=0.7)
    for layer, expected in zip(prunable_layers(pruned).values(), layers, strict=True):
        assert torch.equal(layer.weight, expected[0].weight)


@torch.no_grad()
def test_recalibration_changes_statistics_alone(tiny_model, random_images):
    pruned = stages.prune(tiny_model, 0.5, "global")
    recalibrated = stages.recalibrate(pruned, random_images(32))
    changed = {
        name.rsplit(".", 1)[1]
        for name, tensor in recalibrated.state_dict().items()
        if not torch.equal(tensor, pruned.state_dict()[name])
    }
    assert changed <= {"running_mean", "running_var", "num_batches_tracked"}
    assert "running_mean" in changed
    assert not recalibrated.training


@torch.inference_mode()
def test_fp32_stage(bench, tiny_model):
    pruned = stages.prune(tiny_model, 0.8, "global")
    stage = bench.measure_fp32("pruned", pruned, keep=True)
    plain = bench.folder.file(stages.FP32_NAME)
    assert stage.files.plain_bytes == plain.stat().st_size
    assert stage.files.packed_bytes == bench.folder.file(stages.FP32_PACKED_NAME).stat().st_size
    assert stage.files.packed_bytes < stage.files.plain_bytes
    saved = torch.load(plain, weights_only=True)
    weights = [t for n, t in saved.items() if n.endswith("weight") and t.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert stage.sparsity == pytest.approx(zeros)
    expected = pruned(normalize(bench.test.images)).argmax(dim=1)
    assert torch.equal(stage.predictions, expected)


@torch.inference_mode()
def test_int8_stage_is_the_packed_file(bench, tiny_model):
    pruned = stages.prune(tiny_model, 0.8, "global")
    stage = bench.measure_int8("pruned-int8", pruned, SETTINGS, keep=True)
    images = normalize(bench.test.images)
    for name in (stages.INT8_NAME, stages.INT8_PACKED_NAME):
        reloaded = artifact.load_int8(bench.folder.file(name))
        assert torch.equal(reloaded(images).argmax(dim=1), stage.predictions)
    assert stage.sparsity >= 0.79
    assert stage.files.packed_bytes < stage.files.plain_bytes


def test_what_is_not_kept_leaves_no_file(bench, tiny_model):
    bench.measure_fp32("dense", tiny_model)
    bench.measure_int8("dense-int8", tiny_model, SETTINGS)
    assert bench.folder.names("") == []


def test_an_int8_file_that_reads_back_otherwise_is_refused(bench, tiny_model, monkeypatch):
    monkeypatch.setattr(
        artifact, "logits_in_fresh_process", lambda path, images, threads: torch.zeros(1, 10)
    )
    with pytest.raises(UserError, match="reloaded logits differ"):
        bench.measure_int8("dense-int8", tiny_model, SETTINGS)


def test_stages_are_compared_with_the_first():
    labels = torch.tensor([0, 1, 2, 3])
    predictions = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 3]])
    sizes = (stages.Files(400, 300, 350), stages.Files(100, 60, 50))
    compressed = [
        stages.Stage(name, None, 0.0, files, predicted, torch.nn.Identity())
        for name, files, predicted in zip(("a", "b"), sizes, predictions, strict=True)
    ]
    timings = {name: [Timing(1, 2.0, 0.1, 500.0, 9)] for name in ("a", "b")}
    first, second = stages.describe(compressed, labels, timings)
    assert first["comparison"]["drop"] == 0
    assert second["size_ratio"] == 50 / 400
    assert second["comparison"]["drop"] == 0.25
    assert second["comparison"]["only_a_correct"] == 2
    assert second["comparison"]["only_b_correct"] == 1
    assert second["accuracy"]["correct"] == 2
