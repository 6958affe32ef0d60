"""results.json, tables and plots."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import common
from common import run as run_module
from common.checkpoints.checkpoint import WeightsFile
from common.machine import device
from common.machine.workers import ALONE
from common.report.figures import BLUE, new_figure, save_figure
from common.report.results import (
    against_given,
    counted,
    floor_factor,
    floor_percent,
    format_cost,
    megabytes,
    network_name,
    p_value,
    percent,
    points,
    to_json,
)
from common.report.story import align
from common.run import common_results, find_commit

REPOSITORY = Path(__file__).resolve().parents[1]


def test_common_results(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    arguments = argparse.Namespace(weights=None, output_dir=Path("results"), seed=3, amounts=[0.5])
    inputs = {
        "data": {"source": "bundled", "test_images": 10},
        "weights": WeightsFile(tmp_path / "weights.pth", "--weights weights.pth").describe(),
        "network": {"family": "resnet18-cifar"},
    }
    results = common_results("pruning", arguments, ALONE, inputs)
    assert {"schema", "script", "arguments", "environment", "data", "weights"} <= results.keys()
    assert results["schema"] == 1
    assert results["arguments"] == {
        "amounts": [0.5], "output_dir": "results", "seed": 3, "weights": None,
    }  # fmt: skip
    assert results["weights"]["source"] == "--weights weights.pth"
    assert len(results["weights"]["sha256"]) == 64
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["threads"] == torch.get_num_threads()
    assert isinstance(environment["vnni"], bool)
    assert environment["cpu"]
    assert environment["device"] == "cpu"
    assert results["processes"] == 1
    made = results["made"]
    assert made["version"] == common.__version__
    assert datetime.datetime.fromisoformat(made["date"]).utcoffset() == datetime.timedelta(0)
    assert made["packages"]["numpy"] == np.__version__
    assert made["commit"] == find_commit()
    assert json.loads(to_json(results)) == results


@pytest.mark.parametrize(
    ("value", "text"), [(0.76, "0.8"), (1.0, "1"), (3e-5, "3e-05"), (0.0, "<1e-300")]
)
def test_p_values(value, text):
    assert p_value(value, 1) == text


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="the oracle is Linux's /proc/cpuinfo"
)
def test_vnni_is_what_the_system_says():
    flags = Path("/proc/cpuinfo").read_text()
    assert device.has_vnni() == ("avx512_vnni" in flags or "asimddp" in flags)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),  # with lone surrogates, as in file names that are no UTF-8
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(st.dictionaries(st.text(), json_values, max_size=3))
def test_json_holds_any_value(results):
    text = to_json(results)
    assert text.isascii()
    assert json.loads(text) == results


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_never_written(value):
    with pytest.raises(ValueError, match="JSON"):
        to_json({"value": value})


def test_a_file_name_that_is_no_utf8():
    path = Path(os.fsdecode(b"caf\xe9.pth"))
    assert Path(json.loads(to_json({"weights": str(path)}))["weights"]) == path


cells = st.text(st.characters(categories=["L", "N"]), max_size=8)


@given(st.lists(st.tuples(cells, cells, cells), max_size=5))
def test_a_table_keeps_every_cell(rows):
    header, rule, *lines = align(["a", "b", "c"], rows).split("\n")
    widths = [len(part) for part in rule.split("  ")]
    for row, line in zip([("a", "b", "c"), *rows], [header, *lines], strict=True):
        first, rest = line[: widths[0]].rstrip(" "), line[widths[0] :]
        assert first == row[0].rstrip(" ")
        assert rest.split() == [cell for cell in row[1:] if cell]
        assert line == line.rstrip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.93654), "93.65 %"),
        (percent(1, 0), "100 %"),
        (points(0.00123), "+0.12"),
        (points(-0.02), "-2.00"),
        (points(0), "+0.00"),
        (megabytes(44_776_525), "44.78 MB"),
        (floor_percent(0.99669), "99.66 %"),
        (floor_factor(9.99), "9.9×"),
        (floor_factor(1 / (1 - 0.9)), "10.0×"),
        (floor_percent(0.29), "29.00 %"),  # 100 × 0.29 is less than 29
        (against_given(4.46), "4.5× smaller than the given file"),
        (against_given(1 / 1.9163, 2), "1.92× as large as the given file"),
        (counted(1, "image"), "1 image"),
        (counted(10_000, "image"), "10,000 images"),
        (counted(100 * 0.07, "point"), "7 points"),
        (counted(0.5, "point"), "0.5 points"),
    ],
)
def test_numbers(text, expected):
    assert text == expected


def test_the_commit_is_told_where_git_knows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "REPOSITORY", tmp_path)
    assert find_commit() is None  # no repository: not that of a folder above
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    run(["git", "init"])
    (tmp_path / "file").write_text("one")
    run(["git", "add", "file"])
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run(["git", *author, "commit", "-m", "one"])
    run(["git", *author, "tag", "-a", "v1", "-m", "v1"])
    commit = find_commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "file").write_text("two")
    assert find_commit() == f"{commit}-dirty"


def test_figures_need_no_display_and_repeat(tmp_path):
    for name in ("first.png", "second.png"):
        figure, axes = new_figure(4, 3, columns=2)
        assert len(axes) == 2
        axes[0].plot([0, 1], [0.5, 0.9], color=BLUE)
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        assert image.size == (520, 390)


def test_importing_report_imports_no_matplotlib():
    code = "import sys, common.report.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_the_peak_of_memory_counts_what_was_freed_and_not_who_started_the_process():
    code = (
        "from common.machine import device; import torch\n"
        "before = device.peak_memory_bytes()\n"
        "torch.ones(75_000_000)\n"  # 300 MB, freed at once
        "print(before, device.peak_memory_bytes())\n"
    )
    held = torch.ones(250_000_000)  # 1 GB, which the new process has nothing of
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    del held
    before, after = map(int, done.stdout.split())
    assert 50e6 < before < 1e9
    assert 290e6 < after - before < 400e6


def test_the_cost_of_a_run_is_told():
    cost = {"wall_seconds": 3.4, "peak_memory_bytes": 1_234_000_000}
    assert format_cost(cost) == "took 3 s and at most 1,234 MB of memory"
    assert format_cost(cost | {"peak_memory_bytes": None}) == "took 3 s"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("resnet18-cifar", "ResNet18 (CIFAR layout)"),
        ("resnet50-imagenet", "ResNet50 (ImageNet layout)"),
        ("torchvision:vgg11_bn", "vgg11_bn"),
        ("mine\n.py:build", "mine\\n.py:build"),
    ],
)
def test_networks_have_names_for_people(family, name):
    assert network_name({"network": {"family": family}}) == name
