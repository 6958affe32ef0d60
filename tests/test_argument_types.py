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
    accuracy_loss,
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
        (accuracy_loss, "0.499", 0.499),
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
        (accuracy_loss, ["0.5", "1", "2", "-0.01", "nan", "1%"]),
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


def test_points_and_percentages_are_told_what_to_write():
    for parse, text, message in (
        (
            accuracy_loss,
            "1",
            "'1' is not at least 0 and below 0.5; it is a fraction: one point is 0.01",
        ),
        (accuracy_loss, "1%", "'1%': write 0.01"),
        (fraction, "12.5%", "'12.5%': write 0.125"),
        (fraction, "120%", "'120%' is not a fraction between 0 and 1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == message


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
