"""Types for argparse: each parses one kind of value, or says in a line why it cannot."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

MAX_THREADS = 1024  # far more of them crash the OpenMP runtime
MAX_BATCH_SIZE = 4096  # peaks at 6 GB; far more, and the system kills the run

Item = TypeVar("Item")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if (value := _integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    if (value := _integer(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return value


def seed_int(text: str) -> int:
    """Parse a seed: an integer that numpy and torch both take (0 to 2^32 - 1)."""
    if (value := non_negative_int(text)) > 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is larger than 2^32 - 1")
    return value


def thread_count(text: str) -> int:
    """Parse a number of CPU threads."""
    if (value := positive_int(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_THREADS} threads")
    return value


def batch_size(text: str) -> int:
    """Parse a number of images in a batch."""
    if (value := positive_int(text)) > MAX_BATCH_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_BATCH_SIZE} images")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    if not 0.0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    if not 0.0 <= (value := _number(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value


def image_count(text: str) -> int | None:
    """Parse a number of images, or ``all`` (returned as None)."""
    if text == "all":
        return None
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive integer nor 'all'"
        ) from None


def path(text: str) -> Path:
    """Parse a path; empty text, as of an unset shell variable, is not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    if any("\ud800" <= character <= "\udfff" for character in text):
        # Of bytes that are no UTF-8; the libraries that read and write models take no such path.
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return Path(text)


def name(text: str) -> str:
    """Parse a name, for use within ``list_of``."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Make a type for one of some names, for use within ``list_of``."""

    def parse_choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse_choice


def list_of(parse: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """Make a type for comma-separated values, each parsed by ``parse``; repeats are dropped."""

    def parse_list(text: str) -> list[Item]:
        return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_list


def _integer(text: str) -> int:
    # Plain ASCII digits only: int() would also take "1_000", " 7 " and other scripts' digits.
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)


def _number(text: str) -> float:
    """Return NaN, which lies in no range, where ``text`` is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
