"""Closer looks at predictions, against counts by hand."""

from __future__ import annotations

import logging

import pytest
import torch

from common import cli
from common.data import Cifar10
from quantization import inspection


class Certain(torch.nn.Module):
    """Answers class 0 with near-certainty."""

    def forward(self, x):
        return torch.tensor([[20.0] + [0.0] * 9]).expand(len(x), 10)


def test_accuracy_by_class_counts():
    labels = torch.tensor([0, 0, 1, 1])
    rows = inspection.accuracy_by_class(
        labels, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])
    )
    assert rows == [
        {"class": "airplane", "images": 2, "fp32": 0.5, "int8": 1.0},
        {"class": "automobile", "images": 2, "fp32": 1.0, "int8": 0.5},
    ]


@pytest.mark.parametrize(
    ("right", "warning"), [(10, "near chance"), (50, "100 % sure"), (90, None)]
)
def test_sanity_of_fp32(random_images, caplog, right, warning):
    images = random_images(100).images
    labels = torch.tensor([0] * right + [1] * (100 - right))
    with caplog.at_level(logging.WARNING, logger=cli.log.name):
        inspection.warn_of_insane_fp32(
            Certain(), Cifar10(images, labels), torch.zeros(100, dtype=torch.int64)
        )
    assert (warning in caplog.text) if warning else not caplog.records


@pytest.mark.parametrize("flips", [0, 3, 40])
def test_contact_sheet_counts_every_flip(random_images, tmp_path, flips):
    dataset = random_images(50)
    changed = dataset.labels.clone()
    changed[:flips] = (changed[:flips] + 1) % 10
    path = tmp_path / "flips.png"
    assert inspection.plot_flips(dataset, dataset.labels, changed, path) == flips
    if flips:
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert not path.exists()
