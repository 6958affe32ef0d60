"""Ctrl-C and SIGTERM at random moments: every script leaves what was there, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli, interruptions

REPOSITORY = Path(__file__).resolve().parents[1]
EARLIER = {"results.json": '{"artifacts": {"model": "model.pth"}}', "model.pth": "earlier"}
ARGUMENTS = {
    "pruning": ["--layers", "layer4.*", "--batch-size", "1"],
    "quantization": ["--calibration-images", "32", "--batch-sizes", "1", "--timing-seconds", "0.2"],
    "pipeline": ["--calibration-images", "32", "--batch-sizes", "1", "--timing-seconds", "0.2"],
    "training": ["--preset", "cpu", "--epochs", "3", "--batch-size", "20", "--train-images", "80",
                 "--held-out-images", "20"],
}  # fmt: skip
TO_RESUME_FROM = {"scan.journal", "unfinished"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_keyboard_interrupt_and_waits_where_it_is_deferred(number):
    before = signal.getsignal(number)
    done = []

    def finish() -> None:
        with interruptions.deferred():
            signal.raise_signal(number)
            done.append("what must be whole")

    with interruptions.as_keyboard_interrupts() as came:
        with pytest.raises(KeyboardInterrupt):
            finish()
        assert came == [number]
    assert done
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored():
    """As under nohup, for a run that goes on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptions.as_keyboard_interrupts() as came, interruptions.deferred():
            signal.raise_signal(signal.SIGHUP)
        assert came == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ARGUMENTS)
def test_interrupted_at_any_moment(script, number, tmp_path):
    moment = random.Random(f"{script} {number}").uniform(1, 9)
    for name, content in EARLIER.items():
        (tmp_path / name).write_text(content)
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / script / f"{script}.py", "--bundled", "--threads", "1",
         "--test-images", "40", *ARGUMENTS[script], "--output-dir", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGINT:  # a terminal sends it to all processes of the run
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    out, err = process.communicate(timeout=600)
    if (tmp_path / "results.json").read_text() != EARLIER["results.json"]:
        assert "written" in out  # it was quicker than the signal
        return
    before_main = process.returncode == -number  # on a busy machine: Python's own ending
    assert before_main or (process.returncode == cli.EXIT_INTERRUPTED and "Traceback" not in err)
    assert out == ""
    left = [path for path in tmp_path.iterdir() if path.name not in TO_RESUME_FROM]
    assert {path.name: path.read_text() for path in left} == EARLIER
