"""Ctrl-C, SIGTERM and SIGHUP: every script leaves what was there, and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import REPOSITORY, Copy, foreground_signals

from common.command import cli, interruptions
from common.files.output import STAGING_PREFIX, UNFINISHED_NAME, OutputFolder

EARLIER = {"results.json": '{"artifacts": {"model": "model.pth"}}', "model.pth": "earlier"}
ARGUMENTS = {
    "pruning": ["--layers", "layer4.1.*", "--amounts", "0.5,0.9", "--batch-size", "4"],
    "quantization": ["--calibration-images", "16", "--batch-sizes", "1", "--timing-seconds", "0.1"],
    "pipeline": ["--max-drop", "0.49", "--calibration-images", "16", "--batch-sizes", "1",
                 "--timing-seconds", "0.1"],
    "training": ["--epochs", "2", "--batch-size", "10", "--train-images", "30",
                 "--held-out-images", "10"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _foreground() -> Iterator[None]:
    """Let the signals arrive, also where the tests run in the background."""
    with foreground_signals():
        yield


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(number):
    """As under nohup and behind a shell's &, for a run that goes on when its terminal closes."""
    signal.signal(number, signal.SIG_IGN)
    with interruptions.as_keyboard_interrupts() as came:
        signal.raise_signal(number)
        with interruptions.deferred():
            assert signal.getsignal(number) is signal.SIG_IGN
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):  # what stops it all the same
            signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]
    assert signal.getsignal(number) is signal.SIG_IGN


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the results of an earlier run."""
    for name, content in EARLIER.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def command_of(script: str, folder: Path, weights: Path) -> list[object]:
    shared = ["--bundled", "--threads", "1", "--test-images", "12", "--output-dir", folder]
    read = [] if script == "training" else ["--weights", weights]
    return [*ARGUMENTS[script], *shared, *read]


def main_of(script: str):
    return importlib.import_module(f"{script}.{script}").main


def check_nothing_changed(folder: Path) -> None:
    left = [path for path in folder.iterdir() if path.name != UNFINISHED_NAME]
    assert {path.name: path.read_text() for path in left} == EARLIER


def interrupted(main, *command: object, folder: Path) -> None:
    """Run ``main`` in a copy of this process: an import that is cut short would stay so here."""
    told = folder.with_name(f"{folder.name}-told")
    with Copy(main, *command, output=told) as copy:
        done = copy.wait()
    assert (done.returncode, done.stdout) == (cli.EXIT_INTERRUPTED, ""), done.stderr
    assert "Traceback" not in done.stderr
    check_nothing_changed(folder)


# Where a run makes fewer calls than the chosen moment.
LATEST = {OutputFolder.commit.__code__}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_interrupted_at_any_call(script, folder, tiny_weights):
    """At the first calls inputs are read, later networks run."""
    moment, calls = random.Random(script).randrange(2_000, 400_000), itertools.count()

    def watch(frame: object, event: str, argument: object) -> None:
        if event == "call" and (next(calls) == moment or frame.f_code in LATEST):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGTERM)

    def main(argv: list[str]) -> int:
        sys.setprofile(watch)
        return main_of(script)(argv)

    interrupted(main, *command_of(script, folder, tiny_weights), folder=folder)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_interrupted_while_files_are_written(script, folder, tiny_weights, monkeypatch):
    name_file, files = OutputFolder.file, itertools.count()
    chosen = random.Random(script).randrange(3)

    def interrupt(self: OutputFolder, name: str) -> Path:
        if next(files) == chosen:
            signal.raise_signal(signal.SIGINT)
        return name_file(self, name)

    monkeypatch.setattr(OutputFolder, "file", interrupt)
    interrupted(main_of(script), *command_of(script, folder, tiny_weights), folder=folder)


def test_a_signal_that_a_library_swallows_stops_the_run(folder, tiny_weights, monkeypatch):
    name_file = OutputFolder.file

    def swallow(self: OutputFolder, name: str) -> Path:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return name_file(self, name)

    monkeypatch.setattr(OutputFolder, "file", swallow)
    command = command_of("quantization", folder, tiny_weights)
    interrupted(main_of("quantization"), *command, folder=folder)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_torch_is_imported_where_signals_end_the_run(script, monkeypatch):
    def stop() -> None:
        raise SystemExit(77)

    monkeypatch.setattr(cli, "import_torch", stop)
    with pytest.raises(SystemExit, match="77"):
        main_of(script)([])


def test_ctrl_c_in_a_terminal(folder, tiny_weights):
    """It goes to all processes of the run; here as files are written and another process starts."""
    with subprocess.Popen(
        [sys.executable, REPOSITORY / "quantization" / "quantization.py",
         *map(str, command_of("quantization", folder, tiny_weights))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        while not list(folder.glob(f"{STAGING_PREFIX}*/*.safetensors")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(random.Random(0).uniform(0, 0.4))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (cli.EXIT_INTERRUPTED, ""), err
    assert "Traceback" not in err
    check_nothing_changed(folder)
