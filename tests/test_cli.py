"""Flags, messages, and exit codes as a shell sees them."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tqdm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import cli
from pipeline import pipeline
from pruning import pruning
from quantization import quantization
from training import training

REPOSITORY = Path(__file__).resolve().parents[1]
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")

SCRIPT = """
import os, signal, sys, time
from common import cli

@cli.exit_codes
def main(argv=None):
    cli.set_up_messages(quiet=False)
    {body}
    return cli.EXIT_DONE

sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stdout be buffered, as it is for users: what fails is then found when it is flushed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


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
        assert done.stdout == "\\xd7 \\u2013 \\u2500\n"


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


def test_importing_cli_is_cheap():
    done = run("assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys()")
    assert (done.returncode, done.stderr) == (0, "")


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_messages_go_to_stderr(quiet, capsys):
    cli.set_up_messages(quiet)
    cli.set_up_messages(quiet)  # setting up twice must not double them
    cli.log.info("a note on %s", "café")
    cli.log.warning("a %s", "risk")
    expected = "warning: a risk\n" if quiet else "a note on café\nwarning: a risk\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_yields_everything(quiet, capsys, monkeypatch):
    # A bar shows only where the work takes long: let each look at the clock find a minute gone.
    monkeypatch.setattr(tqdm.std, "time", itertools.count(step=60).__next__)
    cli.set_up_messages(quiet)
    assert list(cli.progress(range(5), "count")) == list(range(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert ("count" in err) != quiet


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (cli.positive_int, "7", 7),
        (cli.non_negative_int, "0", 0),
        (cli.seed_int, "4294967295", 2**32 - 1),
        (cli.thread_count, "1024", 1024),
        (cli.batch_size, "4096", 4096),
        (cli.positive_float, "1e-3", 0.001),
        (cli.fraction, "0", 0.0),
        (cli.fraction, "1", 1.0),
        (cli.fraction, "2.5e-1", 0.25),
        (cli.image_count, "all", None),
        (cli.image_count, "10000", 10_000),
        (cli.list_of(cli.fraction), "0.5, 0.9,0.5", [0.5, 0.9]),
        (cli.list_of(cli.name), "b, a", ["b", "a"]),
        (cli.path, "~/a b", Path("~/a b")),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (cli.positive_int, ["0", "-1", "", " 7", "7 ", "1_000", "1e3", "0x1", "٣", "²", "9" * 30]),
        (cli.non_negative_int, ["-1", "--1", "-", "+1"]),
        (cli.seed_int, ["4294967296", "-1"]),
        (cli.thread_count, ["0", "1025"]),
        (cli.batch_size, ["0", "4097"]),
        (cli.positive_float, ["0", "-1", "nan", "inf", "", "much", "1e999"]),
        (cli.fraction, ["-0.1", "1.0001", "nan", "inf", "-inf", "half", "", "50%"]),
        (cli.image_count, ["0", "ALL", "", "-3"]),
        (cli.list_of(cli.fraction), ["", "0.5,", "0.5;0.6"]),
        (cli.list_of(cli.name), ["", "conv1,", "linear, ,"]),
        (cli.path, [""]),
    ],
)
def test_values_out_of_range(parse, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value).startswith(repr(text.rpartition(",")[2]))


@given(st.text(max_size=12))
@example("1_0")
@example("0" * 400)
@example("٠.٥")
@example("-0")
def test_any_text_is_a_value_in_range_or_refused(text):
    bounds = {
        cli.positive_int: (1, 10**18),
        cli.non_negative_int: (0, 10**18),
        cli.seed_int: (0, 2**32 - 1),
        cli.thread_count: (1, cli.MAX_THREADS),
        cli.batch_size: (1, cli.MAX_BATCH_SIZE),
        cli.fraction: (0, 1),
    }
    for parse, (low, high) in bounds.items():
        try:
            value = parse(text)
        except argparse.ArgumentTypeError:
            continue
        assert low <= value <= high


FLAGS = (
    "--weights", "--data-dir", "--bundled", "--no-bundled", "--test-images", "--batch-size",
    "--device", "--threads", "--seed", "--output-dir", "--overwrite", "--json", "--quiet",
)  # fmt: skip


def shared_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script", formatter_class=cli.HelpFormatter)
    cli.add_shared_arguments(parser, Path("results"))
    return parser


VALUES = st.sampled_from(["all", "cpu", "auto", "0", "1", "0.9", "nan", "1,", ",", "--", "-", "="])


@pytest.mark.parametrize("script", [pruning, quantization, pipeline, training])
def test_any_command_line_parses_or_is_wrong_usage(script, capsys):
    parser = script.build_parser()
    flags = st.sampled_from([*parser._option_string_actions, "--b", "--se=3"])

    @given(st.lists(flags | VALUES | st.text(max_size=5), max_size=6))
    @settings(deadline=None)
    @example(["--test-images", "-1"])
    @example(["--data-dir="])
    def check(argv: list[str]) -> None:
        try:
            args = parser.parse_args(argv)
        except SystemExit as exit_:
            code = exit_.code
        else:
            code = cli.EXIT_DONE
            assert not (args.bundled and args.no_bundled)
            for value in vars(args).values():
                assert not isinstance(value, float) or 0 <= value < math.inf
        assert code in (cli.EXIT_DONE, cli.EXIT_USAGE)
        capsys.readouterr()

    check()


def test_help_shows_every_flag_and_its_default():
    text = shared_parser().format_help()
    assert all(flag in text for flag in FLAGS)
    assert "(default: 2000)" in text
    assert "where results go (default: results)" in text
    assert "None" not in text
    assert "False" not in text


def test_sigterm_during_cleanup_is_130():
    done = run(
        "try:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "finally:\n    print('cleaned')"
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "cleaned\n")


def test_help_shows_a_list_as_it_is_typed():
    parser = argparse.ArgumentParser(formatter_class=cli.HelpFormatter)
    parser.add_argument("--sizes", type=cli.list_of(cli.positive_int), default=[1, 32], help="s")
    assert "s (default: 1,32)" in parser.format_help()
    assert parser.parse_args([]).sizes == [1, 32]
