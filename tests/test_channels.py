"""Removing channels: the closed forms against brute force, and what must cost nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from common.images.data import normalize
from common.network.branching import FoldedNetwork
from common.network.checkpoint import load_model
from common.network.coded import save_coded
from common.network.resnet import BLOCKS, ResNet18, Widths, fold_batch_norm, prunable_layers
from pruning.channels import repair as repair_module
from pruning.channels.allocation import choose_widths, measure_curves, width_grid
from pruning.channels.repair import measure_dense, repair
from pruning.channels.slimmer import Slimmer
from pruning.channels.slimming import slim_by_norm
from pruning.channels.surgeon import (
    DAMPING,
    at_positions,
    cheapest,
    output_statistics,
    refit,
    remove_channels,
    windows,
    without,
)
from quantization.coding.encoder import Original, encode
from quantization.coding.kernels import assemble
from quantization.int8.engines import candidate_engines
from quantization.settings import Settings

FULL = Widths((4, 8, 8, 8))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def model(random_images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ResNet18(FULL)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                torch.nn.init.uniform_(module.weight, 0.5, 2)
                torch.nn.init.normal_(module.bias, 0, 0.3)
        with torch.no_grad():
            model(normalize(random_images(64).images))
    return model.eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_are_what_a_convolution_reads(generator, stride):
    maps = torch.randn(3, 5, 6, 4, generator=generator)
    weight = torch.randn(7, 5, 3, 3, generator=generator)
    bias = torch.randn(7, generator=generator)
    positions = torch.tensor([[0, 5, 3], [1, 2, 3], [4, 0, 2]])
    if stride == 1:
        positions[:, 1:] = torch.tensor([[5, 23], [2, 11], [20, 8]])
    flat = torch.cat([weight.flatten(1), bias[:, None]], dim=1)
    expected = at_positions(F.conv2d(maps, weight, bias, stride, padding=1), positions)
    torch.testing.assert_close(
        windows(maps, positions, stride) @ flat.T, expected, rtol=1e-4, atol=1e-4
    )


def sample(generator, channels=4, outputs=3, rows=400):
    mixing = torch.randn(channels * 9, channels * 9, generator=generator)
    inputs = torch.randn(rows, channels * 9, generator=generator) @ mixing
    inputs = F.pad(inputs, (0, 1), value=1.0).double()
    weight = torch.randn(outputs, channels * 9 + 1, generator=generator).double()
    return inputs, weight, inputs.T @ inputs / rows


def damping_of(gram):
    return DAMPING * gram.diagonal()[:-1].mean()


def test_the_cheapest_channel_is_that_of_least_squares(generator):
    inputs, weight, gram = sample(generator)
    damping = damping_of(gram).sqrt() * torch.eye(len(gram)).double()
    damping[-1] = 0
    rows = torch.cat([inputs / len(inputs) ** 0.5, damping])  # ridge, as rows of its own
    outputs, errors = rows @ weight.T, []
    for channel in range(4):
        left = [c for c in range(37) if c // 9 != channel]
        solution = torch.linalg.lstsq(rows[:, left], outputs).solution
        errors.append(float((rows[:, left] @ solution - outputs).square().sum()))
        if channel == min(range(len(errors)), key=errors.__getitem__):
            best = (left, solution)
    hessian = gram + (damping**2)
    removed = cheapest(weight, torch.linalg.inv(hessian), 1)
    assert removed.item() == errors.index(min(errors))
    updated, inverse = without(weight, torch.linalg.inv(hessian), removed)
    torch.testing.assert_close(updated, best[1].T)
    torch.testing.assert_close(inverse, torch.linalg.inv(hessian[best[0]][:, best[0]]))
    kept = remove_channels(gram, weight, [3])[3]
    assert kept.channels.tolist() == [c for c in range(4) if c != removed.item()]
    torch.testing.assert_close(kept.weight, best[1].T)


def test_dead_and_doubled_channels_cost_nothing(generator):
    inputs, weight, _ = sample(generator, channels=6)
    inputs[:, 9:18] = 0
    inputs[:, 36:45] = inputs[:, 18:27]
    gram = inputs.T @ inputs / len(inputs)
    kept = remove_channels(gram, weight, [6, 5, 4])
    assert torch.allclose(kept[6].weight, weight)
    assert kept[5].channels.tolist() == [0, 2, 3, 4, 5]
    assert kept[4].channels.tolist() in ([0, 2, 3, 5], [0, 3, 4, 5])
    columns = [c for c in range(55) if c == 54 or c // 9 in kept[4].channels]
    found, expected = inputs[:, columns] @ kept[4].weight.T, inputs @ weight.T
    assert (found - expected).square().mean() < 1e-3 * expected.var()


def test_refitting_is_least_squares_and_the_anchor_decides_where_nothing_is_known(generator):
    inputs, weight, gram = sample(generator)
    outputs = inputs @ weight.T
    cross = outputs.T @ inputs / len(inputs)
    torch.testing.assert_close(refit(gram, cross, weight), weight)
    found = refit(torch.zeros_like(gram) + torch.eye(37) * 1e-9, torch.zeros_like(cross), weight)
    assert torch.allclose(found[:, :-1], weight[:, :-1] * DAMPING / (1 + DAMPING))
    mean, variance = output_statistics(gram, weight)
    plain = inputs[:, :-1] @ weight[:, :-1].T
    torch.testing.assert_close(mean, plain.mean(0))
    torch.testing.assert_close(variance, plain.var(0, correction=0))


@pytest.mark.parametrize(
    ("width", "grid"),
    [
        (512, [*range(64, 513, 64)]),
        (256, [*range(32, 257, 32)]),
        (64, [16, 32, 48, 64]),
        (40, [16, 32, 40]),
        (5, [1, 2, 3, 4, 5]),
    ],
)
def test_widths_are_what_kernels_like(width, grid):
    assert width_grid(width) == grid


def test_chosen_widths_are_the_best_of_all(generator):
    for seed in range(5):
        generator.manual_seed(seed)
        curves = {
            name: dict(zip((1, 2, 4), torch.rand(3, generator=generator).tolist(), strict=True))
            for name in "abcd"
        }
        costs = {name: {w: (i + 1.0) * w for w in (1, 2, 4)} for i, name in enumerate("abcd")}
        budget = 20.0
        chosen = choose_widths(curves, costs, budget)
        assert sum(costs[name][width] for name, width in chosen.items()) <= budget
        best = min(
            sum(curves[name][width] for name, width in zip("abcd", widths, strict=True))
            for widths in itertools.product((1, 2, 4), repeat=4)
            if sum(costs[n][w] for n, w in zip("abcd", widths, strict=True)) <= budget
        )
        assert sum(curves[name][width] for name, width in chosen.items()) == pytest.approx(best)
    with pytest.raises(ValueError, match="no widths"):
        choose_widths(curves, costs, 9.9)
    # Each block's cost rounded up, the four were found to be over the budget that they just fit.
    assert choose_widths(curves, costs, 10.0) == dict.fromkeys("abcd", 1)


def make_redundant(model):
    """Make half of the channels of every block copies of the others, or dead."""
    with torch.no_grad():
        for name in BLOCKS:
            block = model.get_submodule(name)
            half = len(block.conv1.weight) // 2
            for tensor in (block.conv1.weight, *block.bn1.parameters(), *block.bn1.buffers()):
                if tensor.ndim:
                    tensor[half:] = tensor[:half]
            block.bn1.weight[half] = 0
            block.bn1.bias[half] = -1


@torch.no_grad()
def test_a_network_of_doubled_channels_is_as_good_at_half_its_width(model, random_images):
    make_redundant(model)
    images = random_images(64).images
    dense_widths = dict(zip(BLOCKS, FULL.inner, strict=True))
    half = {name: width // 2 for name, width in dense_widths.items()}
    grid = {name: [half[name], dense_widths[name]] for name in BLOCKS}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = measure_dense(model, images, grid, 0, torch.float32)
    slim = repair(dense, half)
    assert slim.widths == Widths(FULL.stages, tuple(half.values()))
    x = normalize(images)
    expected = model(x)
    assert (slim(x) - expected).abs().max() < 0.05 * expected.std()
    assert (slim_by_norm(model, half)(x) - expected).abs().max() > 0.1 * expected.std()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    curves = measure_curves(FoldedNetwork.of(model), dense.kept, half, images)
    assert all(abs(curve[half[name]]) < 1e-3 for name, curve in curves.items())


@torch.no_grad()
def test_repair_brings_a_narrow_network_closer(model, random_images):
    images, others = random_images(200).images, normalize(random_images(64, seed=3).images)
    widths = {name: width - 1 for name, width in zip(BLOCKS, FULL.inner, strict=True)}
    grid = {name: [width, width + 1] for name, width in widths.items()}
    slim = repair(measure_dense(model, images, grid, 0, torch.float32), widths)
    expected = model(others)
    repaired = (slim(others) - expected).square().mean()
    assert repaired < 0.5 * (slim_by_norm(model, widths)(others) - expected).square().mean()
    slim.train()  # the batch norms know what the weights give: training goes on from there
    x = normalize(images)
    trained = slim(x)
    assert (trained - slim.eval()(x)).square().mean() < 0.2 * trained.var()


@torch.no_grad()
def test_a_first_convolution_makes_up_for_the_blocks_before_it(model, random_images, monkeypatch):
    images = random_images(200).images
    widths = {name: width - 2 for name, width in zip(BLOCKS, FULL.inner, strict=True)}
    grid = {name: [width, width + 2] for name, width in widths.items()}
    dense, expected = measure_dense(model, images, grid, 0, torch.float32), model(normalize(images))

    def error():
        return (repair(dense, widths)(normalize(images)) - expected).square().mean()

    refitted = error()
    monkeypatch.setattr(repair_module, "INNER_DAMPING", 1e9)  # as it was
    assert refitted < 0.95 * error()


def without_first_weights(block):
    block.conv1.weight.zero_()


def without_second_weights(block):
    block.conv2.weight.zero_()


def without_first_gammas(block):
    block.bn1.weight.zero_()
    block.bn1.bias.uniform_(0.1, 5.0)


def without_second_gammas(block):
    block.bn2.weight.zero_()


def never_firing(block):
    without_first_gammas(block)
    block.bn1.bias.neg_()


def with_tiny_gammas(block):
    block.bn1.weight.mul_(1e-30)
    block.bn2.weight.mul_(1e-30)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "empty",
    [
        without_first_weights, without_second_weights, without_first_gammas, without_second_gammas,
        never_firing, with_tiny_gammas,
    ],
)  # fmt: skip
def test_channels_of_layers_that_are_zero_go_for_nothing(model, random_images, empty, dtype):
    """They made slim networks NaN, or ended in a traceback of the Cholesky factorisation."""
    torch.manual_seed(0)
    for name in BLOCKS:
        empty(model.get_submodule(name))
    images = random_images(64).images
    slim = Slimmer(model, images, 0, dtype).slim(0.5)
    assert sum(slim.widths.inner) < sum(model.widths.inner)
    expected, found = (network(normalize(images)) for network in (model, slim))
    assert (found - expected).norm() < 0.02 * expected.norm()
    again = Slimmer(slim, images, 0, dtype)  # its batch norms are those of any network
    assert again.slim(again.least_share())(normalize(images)).isfinite().all()


def test_a_coded_network_of_zeros_can_be_made_slim(model, random_images, tmp_path):
    images = random_images(64)
    layers = encode(fold_batch_norm(model), images, price=1e6)
    settings = Settings(candidate_engines()[-1], observer="minmax")
    path = tmp_path / "coded.safetensors"
    save_coded(assemble(layers, images, settings, 32), path)
    empty = load_model(path)
    zero = [name for name, layer in prunable_layers(empty).items() if not layer.weight.any()]
    assert len(zero) > 5
    slim = Slimmer(empty, images.images, 0, torch.float32).slim(0.5)
    with torch.no_grad():
        expected, found = (network(normalize(images.images)) for network in (empty, slim))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    layers = encode(fold_batch_norm(slim), images, 0.02, original=Original(
        fold_batch_norm(empty), Slimmer(empty, images.images, 0, torch.float32).channels_of(slim)
    ))  # fmt: skip
    assert all(layer.dense().isfinite().all() for layer in layers.values())
