"""A run's story: results.json laid out once for the console, the CSV files and the page."""

import csv
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.command.cli import REPOSITORY, visible

WIDTH = 80  # columns of a terminal
# By suffix: the name of the kind, and how its files are loaded.
KINDS = {
    ".safetensors": ("INT8", "from quantization import load_int8; model = load_int8(FILE), where "
                     f"Python finds this repository: PYTHONPATH={visible(REPOSITORY)}. On a device "
                     "without torch: runtime/decode.py (docs/ship_it.md)"),
    ".onnx": ("ONNX", "onnxruntime.InferenceSession(FILE), which takes float32 images, normalised. "
              "One for uint8 pixels: runtime/decode.py MODEL.safetensors MODEL.onnx "
              "--input pixels"),
    ".check": ("check", "python decode.py MODEL.safetensors --check MODEL.check on the device, "
               "with a copy of runtime/decode.py"),
    ".pth": ("FP32", "--weights of each script, or torch.load(FILE, weights_only=True), a state "
             "dict"),
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    # Heading, with the unit where the values show none; None for a column of CSV files alone.
    heading: str | None
    # A row's value: a function, or the way to it in results.json, such as ``accuracy.value``.
    value: Callable[[Any], object] | str
    show: Callable[[Any], str] = str  # returns a value as text; None is shown as nothing
    # Name in CSV files, by default the heading; empty for a column that they lack.
    name: str | None = None

    def get(self, row: Any) -> Any:
        """Return a row's value; None if the way to it ends before."""
        if callable(self.value):
            return self.value(row)
        for key in self.value.split("."):
            if row is not None:
                row = row[int(key)] if isinstance(row, list) else row.get(key)
        return row

    def cell(self, row: object) -> str:
        """Return a row's value as text."""
        value = self.get(row)
        return "" if value is None else self.show(value)


@dataclass(frozen=True)
class Table:
    """Rows, any objects that the columns understand, under a title; a note explains them."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[object]
    note: str = ""

    @property
    def shown(self) -> list[Column]:
        """The columns that people see."""
        return [column for column in self.columns if column.heading is not None]

    @property
    def cells(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[column.cell(row) for column in self.shown] for row in self.rows]

    def text(self) -> str:
        """Lay the table out for a console."""
        headings = [column.heading for column in self.shown]
        parts = fill(self.title), align(headings, self.cells), fill(self.note, "  ")
        return "\n".join(filter(None, parts))

    def write_csv(self, path: Path) -> None:
        """Write the table's values, unformatted, under the columns' names."""
        named = [(c.heading if c.name is None else c.name, c.get) for c in self.columns]
        named = [(name, value) for name, value in named if name]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([name for name, _ in named])
            writer.writerows([value(row) for _, value in named] for row in self.rows)


@dataclass(frozen=True)
class Facts:
    """Facts under a title, each with a short name."""

    title: str
    pairs: Mapping[str, str]

    def text(self) -> str:
        """Lay the facts out for a console."""
        width = max(map(len, self.pairs)) + 4
        pairs = ((f"  {name}".ljust(width), value) for name, value in self.pairs.items())
        lines = [fill(value, " " * width, first) for first, value in pairs]
        return "\n".join([fill(self.title), *lines])


@dataclass(frozen=True)
class Story:
    """A whole run."""

    title: str  # what was done, to what
    setting: str  # on which images and which machine
    # Figures that a reader takes away, each with its meaning; on the page alone, as the parts say
    # them too.
    headlines: Sequence[tuple[str, str]]
    parts: Sequence[Table | Facts | str]  # in reading order; texts are sentences
    captions: Mapping[str, str] = field(default_factory=dict)  # what each plot shows, by file name
    cost: str = ""  # how long the run took, and how much memory

    def text(self, output_dir: Path) -> str:
        """Lay the story out for a console."""
        parts = [fill(part) if isinstance(part, str) else part.text() for part in self.parts]
        first = f"{self.title}\n{fill(self.setting)}"
        last = f"{self.cost}\nwritten to {visible(output_dir)}"
        return "\n\n".join([first, *parts, last]) + "\n"


def fill(text: str, indent: str = "", first_indent: str | None = None) -> str:
    """Wrap a text for a console; file names and the like stay whole."""
    return textwrap.fill(
        text, WIDTH - 1, initial_indent=indent if first_indent is None else first_indent,
        subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def align(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns; those for which the console is too narrow follow below."""
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        if sum(widths[one] + 2 for one in [*blocks[-1], column]) - 2 >= WIDTH and blocks[-1] != [0]:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join(_align_block(table, widths, block) for block in blocks)


def _align_block(table: Sequence[Sequence[str]], widths: Sequence[int], block: list[int]) -> str:
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    padded.insert(1, ["─" * width for width in widths])
    return "\n".join("  ".join(row[column] for column in block).rstrip() for row in padded)


def list_files(artifacts: Mapping[str, str | list[str]]) -> list[str]:
    """Return the names of the files in results.json's ``artifacts``, each once."""
    lists = [[entry] if isinstance(entry, str) else entry for entry in artifacts.values()]
    return list(dict.fromkeys(itertools.chain(*lists)))


def how_to_load(artifacts: Mapping[str, str | list[str]]) -> list[Facts]:
    """Return facts that name the written models and say how to load each, if there are any."""
    files, facts = list_files(artifacts), {}
    for suffix, (kind, how) in KINDS.items():
        if names := [visible(name) for name in files if name.endswith(suffix)]:
            facts[kind] = f"{', '.join(names)}: {how}"
    return [Facts("The models, and how to load them", facts)] if facts else []
