"""A run's story on one page: report.html, a single file that needs no network and no JavaScript.

What a page tells is a :class:`Story`, which each script makes of its results.json. How it looks
lies in html_report.css. File names, and whatever else came from outside, are text and stay text:
everything is escaped, and the page forbids the browser to load or run anything.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.output import OutputFolder, replace_file
from common.report import format_cost

REPORT_NAME = "report.html"
STYLE = Path(__file__).with_suffix(".css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """A table: its title, the header, rows as long as the header, and a note on how to read it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Story:
    """What a run has to tell.

    Attributes:
        title: Of the page.
        question: What was asked, in a sentence or two.
        numbers: The few numbers that answer it, each with what it is.
        findings: Sentences, each a paragraph.
        tables: In the order of the page.
        captions: For each plot's file name one sentence, in the order of the page; plots without
            one come last, under their names.
    """

    title: str
    question: str
    numbers: Sequence[tuple[str, str]]
    findings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    captions: Mapping[str, str] = field(default_factory=dict)


def add_report(results: dict, story: Story, folder: OutputFolder) -> None:
    """Write report.html beside the plots that it embeds, and name it among the artefacts.

    Args:
        results: results.json, complete but for this; changed in place.
        story: What the page tells.
        folder: Of the run.
    """
    results["artifacts"]["report"] = REPORT_NAME
    names = [name for name in story.captions if name in results["artifacts"]["plots"]]
    names += [name for name in results["artifacts"]["plots"] if name not in names]
    plots = {name: folder.file(name).read_bytes() for name in names}
    page = render(results, story, plots)
    replace_file(folder.file(REPORT_NAME), lambda file: file.write(page.encode()))


def render(results: dict, story: Story, plots: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        results: results.json: what was asked for, on which machine.
        story: What the page tells.
        plots: For each plot's file name its PNG, in the order of the page.
    """
    figures = (_figure(story.captions.get(name, name), png) for name, png in plots.items())
    given = results["arguments"]
    arguments = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    if given.get("test_images", 0) is None:
        arguments["--test-images"] = "all"
    sources = {
        f"{group}: {key.replace('_', ' ')}": value
        for group in ("weights", "data")
        for key, value in results[group].items()
    }
    cost = {"this run": format_cost(results)}
    body = [
        f"<h1>{text(story.title)}</h1>",
        f'<p class="asked">{text(story.question)}</p>',
        _numbers(story.numbers),
        *(f"<p>{text(sentence)}</p>" for sentence in story.findings),
        *(_section(table.title, _table(table)) for table in story.tables),
        _section("Plots", "\n".join(figures)) if plots else "",
        _section("Settings", _pairs(arguments)),
        _section("Where it ran, and on what", _pairs(results["environment"] | sources | cost)),
    ]
    content = "\n".join(filter(None, body))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(story.title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Return ``value`` as HTML text: nothing in it is markup, and nothing invisible."""
    if value is None or isinstance(value, bool):
        value = {None: "–", True: "yes", False: "no"}[value]
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return html.escape(visible)


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    items = (f"<li><strong>{text(n)}</strong><span>{text(what)}</span></li>" for n, what in numbers)
    return f'<ul class="numbers">{"".join(items)}</ul>'


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>"


def _table(table: Table) -> str:
    note = f'\n<p class="note">{text(table.note)}</p>' if table.note else ""
    rows = "\n".join(_row("td", row) for row in table.rows)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead>{_row("th", table.header)}</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>{note}"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{text(cell)}</{tag}>' for cell in cells)}</tr>"


def _pairs(values: Mapping[str, object]) -> str:
    pairs = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return "<dl>\n" + "\n".join(pairs) + "\n</dl>"


def _figure(sentence: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<figure>\n<figcaption>{text(sentence)}</figcaption>\n"
        f'<div class="wide" tabindex="0"><img alt="{text(sentence)}" '
        f'src="data:image/png;base64,{data}"></div>\n</figure>'
    )
