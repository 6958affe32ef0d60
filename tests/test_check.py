"""The check before the work, on a small network that was fitted to coloured images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cifar import image_set
from torch import nn

from common.checkpoints.resnet import BlockShape, ResNet, ResNetShape
from common.images import check
from common.images.check import (
    Subject,
    _find_exchanged_classes,
    best_normalisation,
    find_mismatches,
)
from common.images.data import ImageSet
from common.images.mismatch import _moments
from common.images.normalisation import NORMALISATIONS
from common.network.tracing import trace

COUNT, CLASS_COUNT = 256, 4
SHAPE = ResNetShape(3, 8, ((BlockShape((8, 8), False),),), CLASS_COUNT)
COLOURS = torch.tensor([[200, 60, 40], [40, 190, 70], [60, 50, 210], [150, 150, 20]])


def coloured_images(seed: int) -> ImageSet:
    """Images whose class is their colour, each brighter or darker, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(COUNT) % CLASS_COUNT
    light = 0.5 + 0.7 * torch.rand(COUNT, 1, 1, 1, generator=generator)
    noise = 50 * torch.randn(COUNT, 3, 16, 16, generator=generator)
    pixels = COLOURS[labels][:, :, None, None] * light + noise
    classes = ("cherry", "lime", "plum", "quince")
    return image_set(pixels.clamp(0, 255).to(torch.uint8), labels, classes=classes)


def trained(normalisation: str, max_pool: bool = False, **changes: object) -> ResNet:
    mean, std = NORMALISATIONS[normalisation]
    train = replace(coloured_images(0), mean=mean, std=std, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet(SHAPE, max_pool)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(40):
        rows = slice(step % 4 * 64, step % 4 * 64 + 64)
        optimizer.zero_grad()
        logits = model(train.normalize(train.images[rows]))
        nn.functional.cross_entropy(logits, train.labels[rows]).backward()
        optimizer.step()
    for module in model.modules():  # statistics of the final weights
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(train.normalize(train.images))
    return model.eval()


def subject(model: ResNet, **changes: object) -> Subject:
    mean, std = NORMALISATIONS["cifar10"]
    train = replace(coloured_images(1), **({"mean": mean, "std": std} | changes))
    return Subject(model, trace(model, train.shape), train)


@pytest.mark.parametrize("name", ["half", "none", "imagenet"])
def test_the_constants_of_the_training_are_found(name):
    assert best_normalisation(subject(trained(name))) == name


@pytest.mark.parametrize("name", ["half", "none"])
def test_wrong_constants_are_told(name):
    (told,) = find_mismatches(subject(trained(name)))
    assert f"--normalize {name} fits it" in told


@pytest.mark.parametrize(("imagenet", "flag"), [(0.05, "auto"), (0.07, "half")])
def test_labels_shall_decide_where_several_constants_fit_badly(imagenet, flag, monkeypatch):
    scores = {"cifar10": 0.5, "half": 0.02, "imagenet": imagenet, "none": 3.0}
    monkeypatch.setattr(check, "_score_normalisations", lambda subject: scores)
    (told,) = find_mismatches(subject(trained("half")))
    assert f"--normalize {flag} fits it" in told


def test_right_settings_are_not_told():
    assert find_mismatches(subject(trained("cifar10"))) == []


def test_a_folded_network_has_no_statistics_to_tell():
    model = trained("cifar10")
    with torch.no_grad():
        model.bn1.running_var.fill_(1.0)
        model.bn1.running_mean.zero_()
    assert all("normalised otherwise" not in told for told in find_mismatches(subject(model)))


def test_a_forgotten_max_pool_is_told():
    told = find_mismatches(subject(with_max_pool(trained("cifar10", max_pool=True), False)))
    assert any("--max-pool on fits it" in line for line in told)


def with_max_pool(model: ResNet, max_pool: bool) -> ResNet:
    other = ResNet(model.shape, max_pool).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_another_order_of_colours_is_told():
    told = find_mismatches(subject(trained("cifar10", channel_order="bgr")))
    assert any("with --channel-order bgr" in line for line in told)


def test_fewer_labels_are_enough_where_the_batch_norm_speaks_for_the_other_order():
    model = trained("cifar10", channel_order="bgr")
    few = subject(model).first(12)  # half of which are classified correctly, all of them as BGR
    assert any("12 are classified correctly with" in line for line in find_mismatches(few))
    with torch.no_grad():  # as if folded: no statistics
        model.bn1.running_var.fill_(1.0)
        model.bn1.running_mean.zero_()
    assert not any("--channel-order" in line for line in find_mismatches(few))


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 0, 1, 2]])
def test_classes_in_another_order_are_named(order):
    model = trained("cifar10")
    with torch.no_grad():
        for tensor in (model.linear.weight, model.linear.bias):
            tensor.copy_(tensor[order].clone())
    (told,) = find_mismatches(subject(model))
    assert "classes come in another order" in told
    names = subject(model).train.classes
    assert f"lime is called {names[order.index(1)]}" in told


def test_a_network_that_answers_one_class_alone_has_no_order():
    model = trained("cifar10")
    with torch.no_grad():
        model.linear.bias[0] = 1e4
    assert find_mismatches(subject(model)) == []


def test_one_class_that_a_poor_network_confuses_is_no_other_order():
    lime_as_cherry = torch.tensor([0, 0, 2, 3]).repeat(8)
    labels, classes = torch.arange(32) % 4, ("cherry", "lime", "plum", "quince")
    lime_as_cherry[labels == 0] = torch.tensor([0, 1, 2, 3]).repeat(2)
    assert _find_exchanged_classes(lime_as_cherry, labels, classes) == []


def test_moments_of_batches_are_those_of_all_values():
    values = torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 3 + 10
    mean, variance = _moments(iter(values.split(3)))
    assert torch.allclose(mean, values.double().mean((0, 2, 3)))
    expected = values.double().var((0, 2, 3), correction=0)
    assert torch.allclose(variance, expected, rtol=1e-5)
