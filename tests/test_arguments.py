"""The shared flags, parsed and explained."""

from __future__ import annotations

import argparse
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.command import arguments, cli
from pipeline import pipeline
from pruning import pruning
from quantization import quantization
from training import training

FLAGS = (
    "--weights", "--data-dir", "--bundled", "--no-bundled", "--test-images", "--batch-size",
    "--device", "--threads", "--seed", "--output-dir", "--overwrite", "--json", "--quiet",
)  # fmt: skip


def shared_parser() -> argparse.ArgumentParser:
    parser = arguments.make_parser("Do it.\n\n    python script.py  # now\n\nIn detail.")
    arguments.add_shared_arguments(parser, "a_script")
    return parser


VALUES = st.sampled_from(["all", "cpu", "auto", "0", "1", "0.9", "nan", "1,", ",", "--", "-", "="])


@pytest.mark.parametrize("script", [pruning, quantization, pipeline, training])
def test_any_command_line_parses_or_is_wrong_usage(script, capsys):
    parser = script.build_parser()
    flags = st.sampled_from([*parser._option_string_actions, "--b", "--se=3"])

    @given(st.lists(flags | VALUES | st.text(max_size=5), max_size=6))
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
    default = cli.WORKSPACE / "results" / "a_script"
    assert f"whereresultsgo(default:{default})" in "".join(text.split())
    assert "Do it." in text
    assert "In detail." not in text
    assert text.endswith("examples:\n  python script.py\n")
    assert "None" not in text
    assert "False" not in text


@pytest.mark.parametrize("script", [pruning, quantization, pipeline, training])
def test_help_fits_80_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = script.build_parser().format_help()
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert all(str(cli.REPOSITORY) in line for line in wide), wide  # a path cannot be broken


def test_without_docstrings_there_is_still_help():
    """As under ``python -OO``."""
    assert arguments.make_parser(None, "examples").format_help().startswith("usage: ")


def test_help_shows_a_list_as_it_is_typed():
    parser = arguments.make_parser("Time it.")
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32], seconds=5.0)
    assert "batch sizes to time (default: 1,32)" in parser.format_help()
    assert parser.parse_args([]).batch_sizes == [1, 32]
