"""The plots of quantization.py: what they count and cover, and that none fails or warns."""

from __future__ import annotations

import warnings

import pytest
import torch
from cifar import image_set
from matplotlib.figure import Figure

from common.network.execution import Layer
from quantization.int8.conversion import observe
from quantization.report import plots
from quantization.settings import OBSERVERS, Settings


@pytest.mark.parametrize("flips", [1, 3, 12])
def test_the_title_of_few_flips_fits_into_the_figure(flips, random_images, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    dataset = random_images(1000)
    changed = dataset.labels.clone()
    changed[:flips] = (changed[:flips] + 1) % 10
    plots.plot_flips(dataset, dataset.labels, changed, tmp_path / "flips.png")
    (figure,) = figures
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width


@pytest.mark.parametrize("flips", [0, 3, 40])
def test_contact_sheet_counts_every_flip(random_images, tmp_path, flips):
    dataset = random_images(50)
    changed = dataset.labels.clone()
    changed[:flips] = (changed[:flips] + 1) % 10
    path = tmp_path / "flips.png"
    assert plots.plot_flips(dataset, dataset.labels, changed, path) == flips
    if flips:
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert not path.exists()


def test_a_network_of_zeros_is_drawn_without_a_warning(tiny_network, tmp_path):
    zeros = tiny_network.with_layers(
        {
            name: Layer(torch.zeros_like(layer.weight), torch.zeros_like(layer.bias))
            for name, layer in tiny_network.layers.items()
        }
    )
    labels = torch.zeros(2, dtype=torch.int64)
    images = image_set(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), labels, mean=(0.0, 0.0, 0.0))
    observation = observe(zeros, images, "histogram", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_ranges(observation, False, tmp_path / "ranges.png")


# --- the ranges that INT8 has to cover, against what was fed in -----------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_kept_ranges_lie_within_what_was_seen(observer, observe, random_images):
    ranges = plots.activation_ranges(observe(Settings(observer=observer)), reduce_range=False)
    images = random_images(32)
    pixels = images.normalize(images.images)
    if observer != "moving-average":
        assert ranges["input"][:2] == pytest.approx((float(pixels.min()), float(pixels.max())))
    for seen_low, seen_high, kept_low, kept_high in ranges.values():
        step = (kept_high - kept_low) / 255
        assert kept_low >= min(seen_low, 0) - 1.01 * step
        assert kept_high <= max(seen_high, 0) + 1.01 * step


@pytest.mark.parametrize("reduce_range", [False, True])
def test_kept_ranges_are_the_255_steps_that_the_kernels_have(reduce_range, observe):
    observation = observe(Settings(observer="minmax"))
    _, _, kept_low, kept_high = plots.activation_ranges(observation, reduce_range)["input"]
    scale = observation.ranges(reduce_range)["x"].scale
    assert kept_high - kept_low == pytest.approx(255 * scale)


def test_pooling_and_flattening_have_no_range_of_their_own(observe):
    found = plots.activation_ranges(observe(Settings()), reduce_range=False)
    assert len(found) == 1 + 20 + 8 + 1  # the images, convolutions, additions, the linear layer
    assert {"input", "conv1", "layer4.1.conv2", "linear"} <= found.keys()


def test_channels_spread_from_the_weakest_to_the_strongest(tiny_network):
    layer = tiny_network.layers["layer2.0.conv2"]  # 8 channels
    weight = layer.weight.clone()
    for channel, largest in enumerate((3, 1, 8, 2, 5, 7, 6, 4)):
        weight[channel] = 0.5
        weight[channel, 0, 1, 2] = -largest
    network = tiny_network.with_layers({"layer2.0.conv2": Layer(weight, layer.bias)})
    ranges = plots.weight_ranges(network)
    assert list(ranges) == list(network.graph.layers)
    assert ranges["layer2.0.conv2"] == (1.0, 4.0, 8.0)
