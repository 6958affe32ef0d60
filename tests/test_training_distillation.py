"""Distillation: its loss against the formula written out, and a student that comes closer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cifar import normalize
from resnet18 import BLOCKS, ResNet18, Widths
from torch import nn

from common.network.tracing import trace
from training.loop import distillation
from training.loop.distillation import (
    TEMPERATURE,
    Training,
    block_error,
    distill,
    divergence,
    imitation_loss,
)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_the_divergence_is_the_formula():
    student, teacher = [[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], [[1.0, 0.0, 0.0], [-1.0, 2.0, 4.0]]
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (softmax([value / TEMPERATURE for value in row]) for row in (t, s))
        of_image = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected += TEMPERATURE**2 * of_image / len(student)
    found = divergence(torch.tensor(student), torch.tensor(teacher))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_block_s_error_is_in_shares_of_what_it_should_give():
    wanted = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 0.0])}
    given = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 4.0])}
    expected = (1 / 10 + 16 / 100) / 2  # 1 of 1 + 9, 16 of 100
    assert float(block_error(given, wanted)) == pytest.approx(expected)
    zeros = {"a": torch.zeros(3)}
    assert float(block_error(zeros, zeros)) == 0.0


def test_only_the_teacher_s_twin_has_no_loss(tiny_model, random_images):
    inputs = normalize(random_images(4).images)
    twin, other = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.layer2[0].conv1.weight.mul_(0.5)
    for student, is_twin in ((twin, True), (other, False)):
        with imitation_loss(student, tiny_model, dict.fromkeys(BLOCKS)) as loss:
            found = float(loss(inputs, student(inputs), torch.tensor([])).detach())
        assert (found < 1e-9) == is_twin


def test_imitated_blocks_of_a_resnet_are_its_residual_blocks(tiny_model):
    assert trace(tiny_model, (3, 32, 32)).blocks == BLOCKS


def test_network_without_joins_learns_from_logits_alone(random_images):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10)).eval()
    student, images = copy.deepcopy(teacher), random_images(4)
    with torch.no_grad():
        student[3].weight.mul_(0.3)
    inputs = images.normalize(images.images)
    blocks = trace(teacher, images.shape).blocks
    assert blocks == ()
    with imitation_loss(student, teacher, {}) as loss, torch.no_grad():
        found = loss(inputs, student(inputs), torch.tensor([]))
        assert torch.equal(found, divergence(student(inputs), teacher(inputs)))
    distill(student, teacher, Training(images, 1), seed=0)
    assert not student.training


def test_batch_norm_statistics_are_held(tiny_model, random_images):
    student = copy.deepcopy(tiny_model)
    distill(student, tiny_model, Training(random_images(32), epochs=2), seed=0)
    for name, tensor in tiny_model.state_dict().items():
        if "running" in name:
            assert torch.equal(student.state_dict()[name], tensor), name


def test_it_trains_in_the_precision_asked_for(tiny_model, random_images, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        distillation, "fit", lambda state, train, recipe, *_: recipes.append(recipe)
    )
    monkeypatch.setattr(distillation, "choose_precision", lambda device: "bf16")
    training = Training(random_images(8), epochs=1)
    for precision in ("fp32", None):
        distill(copy.deepcopy(tiny_model), tiny_model, training, 0, precision=precision)
    assert [recipe.precision for recipe in recipes] == ["fp32", "bf16"]


def test_a_damaged_student_comes_closer_and_keeps_its_zeros(tiny_model, random_images):
    images = random_images(64)
    inputs = normalize(images.images)
    student = copy.deepcopy(tiny_model)
    weight = student.layer3[1].conv2.weight
    hole = torch.zeros_like(weight, dtype=torch.bool)
    hole[:, ::2] = True
    with torch.no_grad():
        weight.mul_(0.3).masked_fill_(hole, 0)

    @torch.no_grad()
    def distance() -> float:
        student.eval()
        return float((student(inputs) - tiny_model(inputs)).pow(2).mean())

    before, teacher_before = distance(), copy.deepcopy(tiny_model.state_dict())
    distill(student, tiny_model, Training(images, 40), 0, learning_rate=0.001)
    assert distance() < 0.7 * before
    assert not student.training
    assert (weight[hole] == 0).all()
    assert weight[~hole].count_nonzero() == (~hole).sum()
    assert all(torch.equal(v, teacher_before[k]) for k, v in tiny_model.state_dict().items())


def test_a_narrower_student_imitates_the_channels_that_it_has(tiny_model, random_images):
    images, kept = random_images(16), torch.tensor([0, 2, 3])
    widths = tiny_model.widths
    student = ResNet18(Widths((len(kept), *widths.stages[1:]), widths.inner)).eval()
    given = {"conv1": kept, "layer1.0.conv2": kept, "layer1.1.conv2": kept}
    blocks = distillation._block_channels(trace(tiny_model, images.shape), given)
    assert {name for name, channels in blocks.items() if channels is not None} == {
        "layer1.0", "layer1.1",
    }  # fmt: skip
    inputs, outputs = images.normalize(images.images), []
    for model in (student, tiny_model):
        model.layer1[1].register_forward_hook(lambda module, read, given: outputs.append(given))
    with imitation_loss(student, tiny_model, {"layer1.1": kept}) as loss, torch.no_grad():
        logits = student(inputs)
        found = float(loss(inputs, logits, torch.tensor([])))
        mine, wanted = outputs[0], outputs[1][:, [0, 2, 3]]
        error = (mine - wanted).square().mean() / wanted.square().mean()
        expected = float(error + divergence(logits, tiny_model(inputs)))
    assert found == pytest.approx(expected, rel=1e-4)
    distill(student, tiny_model, Training(images, 1), seed=0, channels=given)
