"""Values of flags: what is taken, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.command.argument_types import (
    MAX_BATCH_SIZE,
    MAX_THREADS,
    batch_size,
    fraction,
    image_count,
    list_of,
    name,
    path,
    positive_float,
    positive_int,
    seed_int,
    thread_count,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (positive_int, "7", 7),
        (seed_int, "4294967295", 2**32 - 1),
        (thread_count, "1024", 1024),
        (batch_size, "4096", 4096),
        (positive_float, "1e-3", 0.001),
        (fraction, "0", 0.0),
        (fraction, "1", 1.0),
        (fraction, "2.5e-1", 0.25),
        (image_count, "all", None),
        (image_count, "10000", 10_000),
        (list_of(fraction), "0.5, 0.9,0.5", [0.5, 0.9]),
        (list_of(name), "b, a", ["b", "a"]),
        (path, "~/a b", Path.home() / "a b"),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (
            positive_int,
            [
                "--1",
                "-",
                "+1",
                "0",
                "-1",
                "",
                " 7",
                "7 ",
                "1_000",
                "1e3",
                "0x1",
                "٣",
                "²",
                "9" * 30,
            ],
        ),
        (seed_int, ["4294967296", "-1"]),
        (thread_count, ["0", "1025"]),
        (batch_size, ["0", "4097"]),
        (positive_float, ["0", "-1", "nan", "inf", "", "much", "1e999"]),
        (fraction, ["-0.1", "1.0001", "nan", "inf", "-inf", "half", "", "50%"]),
        (image_count, ["0", "ALL", "", "-3"]),
        (list_of(fraction), ["", "0.5,", "0.5;0.6"]),
        (list_of(name), ["", "conv1,", "linear, ,"]),
        (path, ["", "caf\udce9"]),
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
        positive_int: (1, 10**18),
        seed_int: (0, 2**32 - 1),
        thread_count: (1, MAX_THREADS),
        batch_size: (1, MAX_BATCH_SIZE),
        fraction: (0, 1),
    }
    for parse, (low, high) in bounds.items():
        try:
            value = parse(text)
        except argparse.ArgumentTypeError:
            continue
        assert low <= value <= high
