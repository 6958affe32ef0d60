"""The figure that the README leads with, held by a run on the bundled weights and images.

It is also the run of pipeline.py that every change must pass, as a user starts it, page and all.
"""

import json
import subprocess
import sys

import pytest
from check_page import check_page
from check_results import check_results
from processes import REPOSITORY

DEADLINE_SECONDS = 1800  # it takes minutes, and the other tests share the cores


@pytest.mark.full
def test_the_smallest_file_is_65_times_smaller_within_a_point(tmp_path):
    folder = tmp_path / "out"
    command = [
        sys.executable, "pipeline/pipeline.py", "--bundled", "--for", "size", "--test-images",
        "all", "--timing-seconds", "0.1", "--report", "--output-dir", folder,
    ]  # fmt: skip
    process = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    page = check_page((folder / "report.html").read_text())
    assert page.images == [(folder / "frontier.png").read_bytes()]
    (answer,) = results["answers"]
    assert f"{answer['size_ratio']:.1f}× smaller" in page.text
    assert answer["within_budget"]
    assert answer["size_ratio"] >= 65
    assert answer["comparison"]["drop"] <= 0.01
