"""The figure that the README leads with, held by a run on the bundled weights and images."""

import json
import subprocess
import sys

import pytest
from processes import REPOSITORY

DEADLINE_SECONDS = 1800  # it takes minutes, and the other tests share the cores


@pytest.mark.full
def test_the_smallest_file_is_65_times_smaller_within_a_point(tmp_path):
    command = [
        sys.executable, "pipeline/pipeline.py", "--bundled", "--for", "size", "--test-images",
        "all", "--timing-seconds", "0.1", "--batch-sizes", "1", "--output-dir", tmp_path / "out",
    ]  # fmt: skip
    process = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert process.returncode == 0, process.stderr
    (answer,) = json.loads((tmp_path / "out" / "results.json").read_text())["answers"]
    assert answer["within_budget"]
    assert answer["size_ratio"] >= 65
    assert answer["comparison"]["drop"] <= 0.01
