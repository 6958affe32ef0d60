"""Check a report.html as a browser that trusts nobody would."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html.parser import HTMLParser

TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "p", "ul",
    "li", "strong", "span", "div", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd",
    "figure", "figcaption", "img",
}  # fmt: skip
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "tabindex", "alt", "src"}
VOID = {"meta", "img"}
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Page(HTMLParser):
    """What a page shows: its text and its images (PNG)."""

    text: str = ""
    images: list[bytes] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, tag
        assert {name for name, _ in attributes} <= ATTRIBUTES, attributes
        if tag == "img":
            kind, content = dict(attributes)["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(content, validate=True))
            assert self.images[-1].startswith(PNG)
            assert dict(attributes)["alt"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.text += data


def check_page(content: str) -> Page:
    """Raise AssertionError where the page is not well formed, or asks for anything but itself."""
    assert content.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in content or "default-src &#x27;none&#x27;" in content
    page = Page()
    page.feed(content)
    page.close()
    assert not page._open
    return page
