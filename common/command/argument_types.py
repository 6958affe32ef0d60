"""Types for argparse: each parses one kind of value, or says in a line why it cannot."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

MAX_THREADS = 1024  # far more of them crash the OpenMP runtime
MAX_LOSS = 0.5  # whoever writes 1 for --max-drop means one point, not all images
MAX_BATCH_SIZE = 4096  # peaks at 6 GB; far more, and the system kills the run

Item = TypeVar("Item")


class AtMost(int):
    """A default number of images: if there are fewer, all of them are taken."""


def integer(low: int, high: int, what: str) -> Callable[[str], int]:
    """Make a type for an integer from ``low`` to ``high``; errors call it ``what``."""

    def parse_integer(text: str) -> int:
        # Plain ASCII digits only: int() would also take "1_000", " 7 " and other scripts' digits.
        is_integer = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 19
        if not (is_integer and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return parse_integer


def number(low: float, high: float, what: str, is_fraction: bool = False) -> Callable[[str], float]:
    """Make a type for a number; errors call it ``what`` and tell what to write for a percentage."""

    def parse_number(text: str) -> float:
        try:
            value = float(text.removesuffix("%") if is_fraction else text)
        except ValueError:
            value = math.nan  # lies in no range
        if is_fraction and text.endswith("%") and 0 <= value <= 100:
            raise argparse.ArgumentTypeError(f"{text!r}: write {value / 100:.10g}")
        if text.endswith("%") or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse_number


positive_int = integer(1, 10**18, "a positive integer")
# Both numpy and torch accept these seeds.
seed_int = integer(0, 2**32 - 1, "an integer of at least 0 and below 2^32")
thread_count = integer(1, MAX_THREADS, f"a number of threads from 1 to {MAX_THREADS}")
batch_size = integer(1, MAX_BATCH_SIZE, f"a number of images from 1 to {MAX_BATCH_SIZE}")
positive_float = number(math.ulp(0.0), sys.float_info.max, "a number above 0")
fraction = number(0.0, 1.0, "a fraction between 0 and 1", is_fraction=True)
# Half of all images and more is taken for points.
accuracy_loss = number(
    0.0, math.nextafter(MAX_LOSS, 0.0),
    f"at least 0 and below {MAX_LOSS:g}; it is a fraction: one point is 0.01", is_fraction=True,
)  # fmt: skip


def image_count(text: str) -> int | None:
    """Parse a number of images, or ``all`` (returned as None)."""
    return None if text == "all" else integer(1, 10**18, "a positive integer or 'all'")(text)


def path(text: str) -> Path:
    """Parse a path; refuse empty text, which an unset shell variable gives."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    if any("\ud800" <= character <= "\udfff" for character in text):
        # These stand for bytes that are not UTF-8; the libraries for models take no such path.
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return Path(text).expanduser() if text.startswith("~/") or text == "~" else Path(text)


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


def channels(parse: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """Make a type for three comma-separated numbers, each parsed by ``parse``."""

    def parse_channels(text: str) -> tuple[float, ...]:
        values = tuple(parse(part.strip()) for part in text.split(","))
        if len(values) != 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not three numbers: R,G,B")
        return values

    return parse_channels
