"""Messages, and exit codes as a shell sees them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tqdm
from processes import REPOSITORY, foreground_signals

from common.command import cli

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")

SCRIPT = """
import os, signal, sys, time
from common.command import cli

@cli.exit_codes
def main(argv=None):
    cli.set_up_messages(quiet=False)
    {body}
    return cli.EXIT_DONE

sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let stdout be buffered, so that what fails is found when it is flushed; let signals come."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with foreground_signals():
        yield


def run(body: str, stdin: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script whose main does ``body``."""
    options = {"capture_output": True, **options}
    code = SCRIPT.format(body=body.replace("\n", "\n    "))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=REPOSITORY, text=True, encoding="utf-8", errors="replace", timeout=60, **options,
    )  # fmt: skip


# --- exit codes ----------------------------------------------------------------------------------

BODY_IDS = (
    "done", "budget", "user-error", "hostile-text", "os-error", "disk-full", "interrupt", "sigint",
    "sigterm", "sigterm-made-another-error", "memory", "torch-memory",
)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("print('result')", 0, "result\n", ""),
        ("return cli.EXIT_OVER_BUDGET", 3, "", ""),
        ("print('half')\nraise cli.UserError('no\\n such file')", 1, "half\n",
         "error: no such file\n"),
        ("raise cli.UserError('\\x1b[2J\\x07 caf\\xe9 \\ud800 \\u202e')", 1, "",
         "error: \\x1b[2J\\x07 café \\ud800 \\u202e\n"),
        ("open('/nowhere/file')", 1, "", "error: /nowhere/file: No such file or directory\n"),
        ("raise OSError(28, 'No space left on device')", 1, "",
         "error: system: No space left on device\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "", "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 130, "", "interrupted\n"),
        ("try:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
         "except BaseException:\n    raise AttributeError('half imported')", 130, "",
         "interrupted\n"),
        ("raise MemoryError", 1, "", "error: out of memory; a smaller --batch-size needs less\n"),
        ("import torch; torch.empty(1 << 60)", 1, "",
         "error: out of memory; a smaller --batch-size needs less\n"),
    ],
    ids=BODY_IDS,
)  # fmt: skip
def test_exit_codes(body, code, out, err):
    done = run(body)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError", "AssertionError"])
def test_a_bug_keeps_its_traceback(error):
    done = run(f"raise {error}('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith(f"{error}: a bug\n")


def test_wrong_usage_is_2():
    done = run("import argparse; argparse.ArgumentParser(prog='script').parse_args(['--no'])")
    assert done.returncode == 2
    assert done.stderr.endswith("script: error: unrecognized arguments: --no\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_noise(lines):
    code = SCRIPT.format(body=f"print('line\\n' * {lines})")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@needs_dev_full
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_full_disk_behind_stdout_is_one_line(lines):
    with open("/dev/full", "w") as full:
        done = run(
            f"print('line\\n' * {lines})", capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr == "error: system: No space left on device\n"


@needs_dev_full
def test_an_error_is_told_alone_though_stdout_fails_too():
    with open("/dev/full", "w") as full:
        done = run(
            "print('half')\nraise cli.UserError('no such file')",
            capture_output=False, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: no such file\n")


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-15", "utf-8"])
def test_no_encoding_ends_a_run(encoding):
    done = run(
        "print('× – ─'); cli.log.warning('café')",
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0
    if encoding == "ascii":
        assert (done.stdout, done.stderr) == ("x - -\n", "warning: caf\\xe9\n")


def test_closed_streams_end_no_run():
    code = SCRIPT.format(
        body="cli.log.warning('w')\n    for _ in cli.progress([1], 'p'): print('x')"
    )
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" 1>&- 2>&-', sys.executable, code], cwd=REPOSITORY
    )
    assert done.returncode == 0


def test_main_may_run_in_a_thread_and_restores_the_signal():
    done = run(
        "import threading; codes = []\n"
        "inner = cli.exit_codes(lambda argv: 3)\n"
        "thread = threading.Thread(target=lambda: codes.append(inner([])))\n"
        "thread.start(); thread.join(); assert codes == [3]\n"
        "before = signal.getsignal(signal.SIGTERM); inner([])\n"
        "assert signal.getsignal(signal.SIGTERM) is before\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupted_while_torch_imports_numpy():
    """Which torch would go on without, whatever the import raised."""
    done = run(
        "def interrupt(frame, event, argument):\n"
        "    if frame.f_globals.get('__name__', '').startswith('numpy.'):\n"
        "        sys.setprofile(None); os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.setprofile(interrupt)\n"
        "cli.import_torch()\n"
        "os._exit(9)  # the signal was lost"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_threads_that_wait_spin_briefly_unless_the_user_says_otherwise():
    show = "cli.import_torch(); print(os.environ.get('GOMP_SPINCOUNT'))"
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for chosen, count in (
        ({}, cli.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        assert run(show, env=unset | chosen).stdout == f"{count}\n"


def test_importing_what_answers_help_is_cheap():
    done = run(
        "from common.command import arguments\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["quantization", "pruning", "pipeline", "training"])
def test_help_needs_no_torch(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", "--help"]
try:
    runpy.run_path("{script}/{script}.py", run_name="__main__")
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"usage: {script}.py ")
    assert done.stdout.endswith("\nFalse\n")


def test_sigterm_during_cleanup_is_130():
    done = run(
        "try:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "finally:\n    print('cleaned')"
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "cleaned\n")


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_messages_go_to_stderr(quiet, capsys):
    cli.set_up_messages(quiet)
    cli.set_up_messages(quiet)  # setting up twice must not double them
    cli.log.info("a note on %s", "café")
    cli.log.warning("a %s", "risk\x1b[2J")
    warned = "warning: a risk\\x1b[2J\n"
    expected = warned if quiet else f"a note on café\n{warned}"
    assert capsys.readouterr() == ("", expected)


def test_progress_fits_80_columns_of_a_log(capsys, monkeypatch):
    monkeypatch.setattr(tqdm.std, "time", itertools.count(step=60).__next__)
    cli.set_up_messages(quiet=False)
    list(
        cli.progress(range(5), "evaluate a network of a rather long name, once more", unit="image")
    )
    cli.log.warning("a risk")
    written = capsys.readouterr().err
    assert 70 < max(map(len, written.splitlines())) < 80
    assert written.endswith("\nwarning: a risk\n")  # on a line of its own


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_yields_everything(quiet, capsys, monkeypatch):
    # A bar shows only where the work takes long: let each look at the clock find a minute gone.
    monkeypatch.setattr(tqdm.std, "time", itertools.count(step=60).__next__)
    cli.set_up_messages(quiet)
    assert list(cli.progress(range(5), "count")) == list(range(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert ("count" in err) != quiet
