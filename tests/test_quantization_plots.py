"""The plots of quantization.py: what they count, and that nothing makes them fail or warn."""

from __future__ import annotations

import warnings

import pytest
import torch
from cifar import image_set
from matplotlib.figure import Figure

from common.network.execution import Layer
from quantization.int8.conversion import observe
from quantization.report import plots


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
