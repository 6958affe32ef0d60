"""Ctrl-C and SIGTERM at random moments: both scripts leave what was there, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli

REPOSITORY = Path(__file__).resolve().parents[1]
EARLIER = {"results.json": '{"artifacts": {"model": "model.pth"}}', "model.pth": "earlier"}
ARGUMENTS = {
    "pruning": ["--layers", "layer4.*", "--batch-size", "1"],
    "quantization": ["--calibration-images", "32", "--batch-sizes", "1", "--timing-seconds", "0.2"],
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ARGUMENTS)
def test_interrupted_at_any_moment(script, number, tmp_path):
    moments = random.Random(f"{script} {number}")
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for name, content in EARLIER.items():
            (folder / name).write_text(content)
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / script / f"{script}.py", "--bundled", "--threads", "1",
             "--test-images", "40", *ARGUMENTS[script], "--output-dir", folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(1, 9))
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGINT:  # a terminal sends it to all processes of the run
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        out, err = process.communicate(timeout=600)
        if (folder / "results.json").read_text() != EARLIER["results.json"]:
            assert "took" in out  # it was quicker than the signal
            continue
        assert (process.returncode, out) == (cli.EXIT_INTERRUPTED, "")
        assert "Traceback" not in err
        left = {path.name: path for path in folder.iterdir()}
        left.pop("scan.journal", None)  # to resume from
        assert {name: path.read_text() for name, path in left.items()} == EARLIER
