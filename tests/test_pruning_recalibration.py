from types import SimpleNamespace

import pytest
import torch
from resnet18 import batch_norm_after, fold_batch_norm, weight_modules
from torch import nn

from common.command.cli import UserError
from pruning.steps import read_calibration
from pruning.together import recalibration
from pruning.together.recalibration import (
    adopt_statistics,
    recalibrate_batch_norm,
)


def test_first_statistics_are_those_of_a_hand_computation(tiny_model, random_images, monkeypatch):
    monkeypatch.setattr(recalibration, "BATCH_SIZE", 8)
    images = random_images(16)
    with torch.no_grad():
        weight_modules(tiny_model)["conv1"].weight.mul_(0.5)
        batches = [tiny_model.conv1(half) for half, _ in images.batches(8)]
    mean = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    variance = torch.stack([batch.var(dim=(0, 2, 3), correction=1) for batch in batches]).mean(0)
    weights = {name: p.clone() for name, p in tiny_model.named_parameters()}
    recalibrate_batch_norm(tiny_model, images)
    torch.testing.assert_close(tiny_model.bn1.running_mean, mean)
    torch.testing.assert_close(tiny_model.bn1.running_var, variance)
    assert not tiny_model.training
    assert all(torch.equal(p, weights[name]) for name, p in tiny_model.named_parameters())


def test_every_image_weighs_the_same(tiny_model, random_images, monkeypatch):
    """513 calibration images: the last one must not count a fifth."""
    monkeypatch.setattr(recalibration, "BATCH_SIZE", 8)
    images = random_images(17)
    with torch.no_grad():
        maps = [tiny_model.conv1(batch) for batch, _ in images.batches(8)]
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in maps])
    recalibrate_batch_norm(tiny_model, images)
    expected = (8 * means[0] + 8 * means[1] + means[2]) / 17
    torch.testing.assert_close(tiny_model.bn1.running_mean, expected)
    assert {m.momentum for m in tiny_model.modules() if hasattr(m, "momentum")} == {1.0}


def test_one_batch_gives_every_layer_what_training_mode_computes(tiny_model, random_images):
    """But for the variance, which is divided by one less there: the running one is unbiased."""
    images = random_images(32, seed=3)
    recalibrate_batch_norm(tiny_model, images)
    outputs = {}
    norms = {n: m for n, m in tiny_model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda m, x, y, name=name: outputs.update({name: (x[0], m)}))
    with torch.inference_mode():
        tiny_model(images.normalize(images.images))
    assert len(outputs) == 20
    for activations, norm in outputs.values():
        torch.testing.assert_close(
            norm.running_mean, activations.mean(dim=(0, 2, 3)), rtol=2e-2, atol=2e-3
        )


@torch.no_grad()
def test_adopted_statistics_change_nothing_and_can_be_measured_anew(tiny_model, random_images):
    """Of a network whose batch norms were folded, as a coded file holds it."""
    images = random_images(32, seed=3)
    for name, layer in weight_modules(fold_batch_norm(tiny_model)).items():
        tiny_model.get_submodule(name).weight.copy_(layer.weight)
        if name != "linear":
            norm = tiny_model.get_submodule(batch_norm_after(name))
            norm.reset_parameters()
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(layer.bias)
    expected = tiny_model(images.normalize(images.images))
    adopt_statistics(tiny_model, images)
    torch.testing.assert_close(tiny_model(images.normalize(images.images)), expected)
    recalibrate_batch_norm(tiny_model, images)  # of the unpruned network: the same, nearly
    torch.testing.assert_close(
        tiny_model(images.normalize(images.images)), expected, rtol=0.05, atol=0.05
    )


def test_statistics_that_are_there_stay(tiny_model, tiny_state, random_images):
    adopt_statistics(tiny_model, random_images(4))
    assert all(torch.equal(value, tiny_state[n]) for n, value in tiny_model.state_dict().items())


def test_dropout_stays_off(random_images):
    torch.manual_seed(0)
    layers = [nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
    model, images = nn.Sequential(*layers).eval(), random_images(8)
    recalibrate_batch_norm(model, images)
    values = model[1](images.normalize(images.images))
    torch.testing.assert_close(model[2].running_mean, values.mean(dim=(0, 2, 3)))
    assert not any(module.training for module in model.modules())


def test_network_without_batch_norms_is_told():
    with pytest.raises(UserError, match="--recalibrate-bn: the network has no batch norms"):
        read_calibration(SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2))))
