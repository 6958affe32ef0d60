"""FP32 at its best computes what the network computes."""

from __future__ import annotations

import pytest
import torch
from every_kind import EveryKind
from test_engines import Mobile, Residual
from torch import nn

from common.network.tracing import trace_network
from quantization.int8.engines import fp32


class Sums(nn.Module):
    """Sums of three, and what is added and read once more: a convolution, and another value."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.first(x) + x + x.sigmoid()
        y = self.second(x)
        z = self.third(y) + x
        return self.fc((y + x * z.relu()).mean((2, 3)))


@pytest.mark.parametrize("layout", ["plain", "packed", "blocked"])
@pytest.mark.parametrize("kind", [EveryKind, Residual, Mobile, Sums])
def test_packed_convolutions_give_the_same_logits(kind, layout, monkeypatch):
    if layout == "plain":
        monkeypatch.setattr(fp32, "can_pack", lambda: False)
    if layout == "blocked":
        monkeypatch.setattr(fp32, "SMALL_MAP", 12 * 12)
        monkeypatch.setattr(fp32, "MANY_IMAGES", 5)
    torch.manual_seed(0)
    network = trace_network(kind().eval(), (3, 12, 12))
    run, images = fp32.fp32_runner(network), torch.randn(5, 3, 12, 12)
    for count in (5, 1, 8, 5):
        batch = images.repeat(2, 1, 1, 1)[:count]
        given = batch.clone()
        assert torch.allclose(run(batch), network(batch), atol=1e-5, rtol=1e-4)
        assert torch.equal(batch, given)
    assert not run(images.requires_grad_()).requires_grad


@pytest.mark.skipif(not fp32.can_pack(), reason="torch has no packed convolutions here")
def test_large_batches_of_small_maps_are_convolved_in_the_blocked_layout(monkeypatch):
    convolutions = nn.Conv2d(3, 4, 3, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 5)).eval()
    run = fp32.fp32_runner(trace_network(model, (3, 12, 12)))
    layouts = []
    convolve = fp32.F.conv2d
    monkeypatch.setattr(
        fp32.F, "conv2d", lambda x, *rest: layouts.append(x.layout) or convolve(x, *rest)
    )
    run(torch.randn(fp32.MANY_IMAGES - 1, 3, 12, 12))
    assert layouts == []
    run(torch.randn(fp32.MANY_IMAGES, 3, 12, 12))
    assert layouts == [torch._mkldnn] * 2  # not that of one position


@pytest.mark.skipif(not fp32.can_pack(), reason="torch has no packed convolutions here")
def test_weights_are_packed_once_for_each_number_of_images(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
    run, made_for = fp32.fp32_runner(trace_network(model.eval(), (3, 12, 12))), []
    pack = torch._C._nn.mkldnn_reorder_conv2d_weight
    monkeypatch.setattr(
        torch._C._nn,
        "mkldnn_reorder_conv2d_weight",
        lambda *args: made_for.append(args[-1]) or pack(*args),
    )
    for count in (1, 8, 1, 8):
        run(torch.randn(count, 3, 12, 12))
    assert made_for == [[n, *shape] for n in (1, 8) for shape in ((3, 12, 12), (4, 10, 10))]
