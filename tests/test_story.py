import csv
from pathlib import Path

import pytest

from common.report.story import WIDTH, Column, Facts, Story, Table

ROWS = [{"name": "conv1", "share": 0.25}, {"name": "a much longer name", "share": None}]
TABLE = Table(
    "Layers",
    [
        Column("layer", lambda row: row["name"]),
        Column("share", lambda row: row["share"], "{:.1%}".format, name="fraction"),
        Column("mark", lambda row: "≈", name=""),
        Column(None, lambda row: len(row["name"]), name="letters"),
    ],
    ROWS,
    "What the columns say. " * 8,
)


def test_console_aligns_numbers_to_the_right_and_wraps_the_note():
    lines = TABLE.text().splitlines()
    assert lines[0] == "Layers"
    assert lines[1] == "layer               share  mark"
    assert lines[3] == "conv1               25.0%     ≈"
    assert lines[4] == "a much longer name            ≈"
    assert max(map(len, lines)) < WIDTH


def test_csv_holds_values_under_their_names(tmp_path):
    TABLE.write_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["layer", "fraction", "letters"], ["conv1", "0.25", "5"], ["a much longer name", "", "18"],
    ]  # fmt: skip


def test_columns_that_do_not_fit_follow_below():
    wide = [Column(f"batch {size}", lambda row: 0.5, "{:20.1f}".format) for size in range(5)]
    text = Table("", [TABLE.columns[0], *wide], ROWS).text()
    assert max(map(len, text.splitlines())) < WIDTH
    blocks = text.split("\n\n")
    assert [block.split()[0] for block in blocks] == ["layer"] * 3
    assert text.count("conv1") == 3
    assert [text.count(column.heading) for column in wide] == [1] * 5


def test_facts_are_wrapped_beside_their_names():
    text = Facts("Found", {"answer": "yes", "why": "because " * 30}).text()
    lines = text.splitlines()
    assert lines[:2] == ["Found", "  answer  yes"]
    assert all(line.startswith("          because") for line in lines[3:])
    assert max(map(len, lines)) < WIDTH


@pytest.mark.parametrize("part", [TABLE, Facts("Found", {"a": "b"}), "One sentence."])
def test_story_tells_every_part(part, tmp_path):
    story = Story("Title", "Setting", [("3×", "smaller")], [part], cost="took 3 s")
    assert story.text(Path("a\x1b[2J\nb")).endswith("\nwritten to a\\x1b[2J\\nb\n")
    text = story.text(tmp_path)
    assert text.startswith("Title\nSetting\n\n")
    assert (part if isinstance(part, str) else part.text()) in text
    assert text.endswith(f"took 3 s\nwritten to {tmp_path}\n")
