"""A run's story: what results.json says, laid out once for the console, the CSV files and the page.

A table is a list of columns, and each column knows its heading, its value and how the value is
shown. Whoever adds a column adds it here once and finds it everywhere.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH = 80  # columns of a terminal


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Heading, with the unit where the values show none.
        value: Returns a row's value.
        show: Returns a value as text; None is shown as nothing.
        name: Name in CSV files; the heading by default, and no column there where it is empty.
    """

    heading: str
    value: Callable[[Any], object]
    show: Callable[[Any], str] = str
    name: str | None = None

    def cell(self, row: object) -> str:
        """Return a row's value as text."""
        value = self.value(row)
        return "" if value is None else self.show(value)


@dataclass(frozen=True)
class Table:
    """Rows that share their columns.

    Attributes:
        title: What the table shows.
        columns: The columns, from left to right.
        rows: The rows; any objects that the columns understand.
        note: What a reader has to know to read it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[object]
    note: str = ""

    @property
    def headings(self) -> list[str]:
        """The headings, from left to right."""
        return [column.heading for column in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Lay the table out for a console."""
        return "\n".join(
            [
                *([self.title] if self.title else []),
                align(self.headings, self.cells),
                *([fill(self.note, "  ")] if self.note else []),
            ]
        )

    def write_csv(self, path: Path) -> None:
        """Write the table's values, unformatted, under the columns' names."""
        columns = [(c.heading if c.name is None else c.name, c) for c in self.columns]
        columns = [(name, column) for name, column in columns if name]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([name for name, _ in columns])
            writer.writerows([column.value(row) for _, column in columns] for row in self.rows)


@dataclass(frozen=True)
class Facts:
    """Facts under a title, each with a short name."""

    title: str
    pairs: Mapping[str, str]

    def text(self) -> str:
        """Lay the facts out for a console."""
        width = max(map(len, self.pairs)) + 4
        lines = [
            textwrap.fill(
                value,
                WIDTH - 1,
                initial_indent=f"  {name}".ljust(width),
                subsequent_indent=" " * width,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for name, value in self.pairs.items()
        ]
        return "\n".join([self.title, *lines])


@dataclass(frozen=True)
class Headline:
    """A figure that a reader takes away, and what it says."""

    figure: str
    meaning: str


@dataclass(frozen=True)
class Story:
    """A whole run.

    Attributes:
        title: What was done, to what.
        setting: On which images and which machine.
        headlines: The figures to take away; on the page alone, for the parts say them too.
        parts: Tables, facts and sentences, in reading order.
        captions: What each plot shows, by file name.
        cost: How long the run took, and how much memory.
    """

    title: str
    setting: str
    headlines: Sequence[Headline]
    parts: Sequence[Table | Facts | str]
    captions: Mapping[str, str] = field(default_factory=dict)
    cost: str = ""

    def text(self, output_dir: Path) -> str:
        """Lay the story out for a console."""
        parts = [part if isinstance(part, str) else part.text() for part in self.parts]
        parts = [fill(part) if "\n" not in part else part for part in parts]
        first = f"{self.title}\n{fill(self.setting)}"
        return "\n\n".join([first, *parts, f"{self.cost}\nwritten to {output_dir}"]) + "\n"


def fill(text: str, indent: str = "") -> str:
    """Wrap a text for a console; file names and the like stay whole."""
    return textwrap.fill(
        text, WIDTH - 1, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def align(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns: the first to the left, the others to the right."""
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])
