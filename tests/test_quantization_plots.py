"""The plots of quantization.py: what they count, and that nothing makes them fail or warn."""

from __future__ import annotations

import warnings

import pytest
import torch

from quantization.int8 import conversion, engines
from quantization.report import plots, ranges
from quantization.settings import Settings


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


def test_a_network_of_zeros_is_drawn_without_a_warning(tiny_model, random_images, tmp_path):
    for parameter in tiny_model.parameters():
        torch.nn.init.zeros_(parameter)
    images = [(torch.zeros(2, 3, 32, 32), None)]
    observed = conversion.calibrate(tiny_model, images, Settings(engines.candidate_engines()[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranges.plot_ranges(tiny_model, observed, tmp_path / "ranges.png")
