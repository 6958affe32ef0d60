"""Distillation: its loss against the formula written out, and a student that comes closer."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from common.images.data import normalize
from training.loop.distillation import LABEL_SHARE, TEMPERATURE, distill, distillation_loss


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_the_loss_is_the_formula():
    student, teacher = [[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], [[1.0, 0.0, 0.0], [-1.0, 2.0, 4.0]]
    labels = [0, 2]
    expected = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = (softmax([value / TEMPERATURE for value in row]) for row in (t, s))
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        cross_entropy = -math.log(softmax(s)[label])
        loss = (1 - LABEL_SHARE) * TEMPERATURE**2 * divergence + LABEL_SHARE * cross_entropy
        expected += loss / len(labels)
    loss = distillation_loss(lambda images: torch.tensor(teacher))
    targets = torch.nn.functional.one_hot(torch.tensor(labels), 3).float()
    found = loss(torch.zeros(2, 3, 32, 32), torch.tensor(student), targets)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_damaged_student_comes_closer_and_keeps_its_zeros(tiny_model, random_images):
    images = random_images(64)
    inputs = normalize(images.images)
    student = copy.deepcopy(tiny_model)
    weight = student.layer3[1].conv2.weight
    hole = torch.zeros_like(weight, dtype=torch.bool)
    hole[:, ::2] = True
    with torch.no_grad():
        weight.mul_(0.3).masked_fill_(hole, 0)

    def hold_zeros(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.layer3[1].conv2.weight.masked_fill_(hole, 0)

    @torch.no_grad()
    def distance() -> float:
        student.eval()
        return float((student(inputs) - tiny_model(inputs)).pow(2).mean())

    before, teacher_before = distance(), copy.deepcopy(tiny_model.state_dict())
    distill(student, tiny_model, images, epochs=8, seed=0, after_step=hold_zeros)
    assert distance() < 0.7 * before
    assert not student.training
    assert (weight[hole] == 0).all()
    assert weight[~hole].count_nonzero() == (~hole).sum()
    assert all(torch.equal(v, teacher_before[k]) for k, v in tiny_model.state_dict().items())
