"""The page that a run writes: whole, self-contained, and deaf to what names try to say."""

from __future__ import annotations

import pytest
from check_page import PNG, check_page
from hypothesis import given
from hypothesis import strategies as st

from common.html_report import REPORT_NAME, Story, Table, add_report, render, text
from common.output import OutputFolder

STORY = Story(
    title="A title",
    question="A question?",
    numbers=[("4×", "smaller")],
    findings=["A finding."],
    tables=[Table("A table", ["a", "b"], [["1", "2"], ["3", "4"]], "A note.")],
    captions={"second.png": "The second plot.", "first.png": "The first plot."},
)
RESULTS = {
    "arguments": {"seed": 0, "quiet": False, "threads": None, "amounts": [0.5, 0.9]},
    "environment": {"torch": "2", "vnni": True},
    "weights": {"source": "bundled", "sha256": "ab"},
    "data": {"source": "folder", "test_images": 100},
    "wall_seconds": 61.7,
    "peak_memory_bytes": None,
    "artifacts": {"plots": ["first.png", "second.png", "third.png"]},
}


def test_everything_told_is_on_the_page():
    page = check_page(render(RESULTS, STORY, {"first.png": PNG + b"1"}))
    for piece in (
        "A title", "A question?", "4×", "smaller", "A finding.", "A table", "1", "4", "A note.",
        "The first plot.", "--seed", "--quiet", "no", "–", "0.5, 0.9", "yes", "bundled", "ab",
        "weights: sha256", "data: test images", "100",
        "took 62 s",
    ):  # fmt: skip
        assert piece in page.text
    assert page.images == [PNG + b"1"]


def test_all_test_images_are_called_all():
    results = RESULTS | {"arguments": {"test_images": None, "threads": None}}
    content = render(results, STORY, {})
    assert "<dt>--test-images</dt><dd>all</dd>" in content
    assert "<dt>--threads</dt><dd>–</dd>" in content


def test_plots_come_in_the_order_of_the_story(tmp_path):
    results = RESULTS | {"artifacts": dict(RESULTS["artifacts"])}
    with OutputFolder(tmp_path / "out") as folder:
        for name in results["artifacts"]["plots"]:
            folder.file(name).write_bytes(PNG + name.encode())
        add_report(results, STORY, folder)
        folder.commit()
    assert results["artifacts"]["report"] == REPORT_NAME
    page = check_page((tmp_path / "out" / REPORT_NAME).read_text())
    assert page.images == [PNG + f"{n}.png".encode() for n in ("second", "first", "third")]
    assert "third.png" in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>.pth',
    "</style></title><script>",
    "&lt;b&gt;",
    "a\u202eb\x00c\nd\x1b[31m",
    "\udcff.pth",  # a file name that is no UTF-8
]


@given(st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=40))
def test_no_name_becomes_markup(name):
    hostile = Story(
        name, name, [(name, name)], [name], [Table(name, [name], [[name]], name)], {name: name}
    )
    groups = ("arguments", "environment", "weights", "data")
    results = RESULTS | {group: {name: name} for group in groups}
    content = render(results, hostile, {name: PNG})
    content.encode()
    page = check_page(content)  # no tag and no attribute that the page would not have anyway
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert visible in page.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (False, "no"), (0, "0"), (0.02, "0.02"), ([1, 32], "1, 32"),
     ("<&>", "&lt;&amp;&gt;"), ("'", "&#x27;")],
)  # fmt: skip
def test_values_as_text(value, shown):
    assert text(value) == shown
