"""Packed FP32 networks compute what the plain ones compute, and reorder no weight when called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.network.packing import can_pack, pack_convolutions
from common.network.resnet import fold_batch_norm

pytestmark = pytest.mark.skipif(not can_pack(), reason="torch has no packed convolutions here")
KERNELS = torch.ops.mkldnn._convolution_pointwise


def images(count: int, channels: int = 8, height: int = 9, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, channels, height, width, generator=generator)
    return values.to(memory_format=torch.channels_last)


def packed(model: nn.Module) -> torch.fx.GraphModule:
    return pack_convolutions(model.eval().to(memory_format=torch.channels_last), images(8))


def count(model: torch.fx.GraphModule, kernel: object) -> int:
    return sum(node.target is kernel for node in model.graph.nodes)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 8},
        {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2), "groups": 2},
        {"kernel_size": 3, "bias": False},
    ],
)
@torch.inference_mode()
def test_any_convolution_is_packed(options):
    model = nn.Sequential(nn.Conv2d(8, 16, **options))
    fast = packed(model)
    assert count(fast, KERNELS.default) == 1
    for batch in (images(1), images(8), images(3), images(2, height=31, width=17), images(5)):
        given = batch.clone()
        torch.testing.assert_close(fast(batch), model(batch), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast(batch.contiguous()), model(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(batch, given)


@torch.inference_mode()
def test_other_padding_is_left_to_torch():
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, **options))
        assert count(packed(model), KERNELS.default) == 0
        assert torch.equal(packed(model)(images(2)), model(images(2)))


class Block(nn.Module):
    """Two convolutions; ``join`` says what follows the second one."""

    def __init__(self, join):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.join = join

    def forward(self, x):
        y = self.relu6(self.conv1(x))
        return self.join(self, y, self.conv2(y))


def add_in_place(block, y, z):
    z += y
    return block.relu(z)


def add_into_the_residual(block, y, z):
    y += z
    return y * y


def move_past_a_change(block, y, z):
    return z + F.relu(y - 1, inplace=True).mul_(2)


JOINS = {  # how many additions may be fused
    "add": (lambda block, y, z: F.relu(y + z), 1),
    "add in place": (add_in_place, 1),
    "add without ReLU": (lambda block, y, z: z + y, 1),
    "add, then ReLU6": (lambda block, y, z: block.relu6(z + y), 1),
    "add into the residual": (add_into_the_residual, 1),
    "add scaled": (lambda block, y, z: torch.add(z, y, alpha=2), 0),
    "add to itself": (lambda block, y, z: z + z, 0),
    "add a number": (lambda block, y, z: z + 1, 0),
    "add broadcast": (lambda block, y, z: z + y.mean((2, 3), keepdim=True), 0),
    "read again": (lambda block, y, z: (z + y) * z, 0),
    "ReLU and read again": (lambda block, y, z: F.relu(z) * z, 0),
    "something between": (move_past_a_change, 0),
}


@pytest.mark.parametrize("join", JOINS)
@torch.inference_mode()
def test_only_what_is_safe_is_fused(join):
    function, fused = JOINS[join]
    model = Block(function)
    fast = packed(model)
    assert count(fast, KERNELS.binary) == fused
    assert count(fast, KERNELS.default) == 2 - fused
    for batch in (images(8), images(1)):
        given = batch.clone()
        torch.testing.assert_close(fast(batch), model(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(batch, given)


@torch.inference_mode()
def test_a_residual_network_is_left_with_no_other_pass(tiny_model):
    folded = fold_batch_norm(tiny_model).to(memory_format=torch.channels_last)
    fast = pack_convolutions(folded, images(8, 3, 32, 32))
    assert (count(fast, KERNELS.default), count(fast, KERNELS.binary)) == (12, 8)
    layers = [node.target for node in fast.graph.nodes if node.op == "call_module"]
    assert layers == ["avgpool", "linear"]
    assert not any(isinstance(module, nn.Conv2d) for module in fast.modules())


@torch.inference_mode()
def test_no_weight_is_reordered_when_called(capfd):
    model = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1, stride=2))
    fast = packed(model)

    def reorders(network, batch):
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            network(batch)
        lines = capfd.readouterr().out.splitlines()
        assert sum(",exec,cpu,convolution" in line for line in lines) == 2
        return sum(",exec,cpu,reorder" in line for line in lines)

    assert reorders(model, images(8)) > 0
    assert [reorders(fast, images(size)) for size in (1, 8, 32)] == [0, 0, 0]
