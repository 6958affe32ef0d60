"""Read what a script printed, as a person would, knowing nothing of the code that laid it out."""

from __future__ import annotations

import itertools
import re

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def read_table(text: str, header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins with ``header``.

    The rule under the header tells where columns lie; the table ends where a line has something
    between them.
    """
    lines = text.splitlines()
    first = next(
        index
        for index, line in enumerate(lines)
        if line.startswith(header) and lines[index + 1].startswith("─")
    )
    spans = [match.span() for match in re.finditer("─+", lines[first + 1])]
    gaps = [at for (_, end), (start, _) in itertools.pairwise(spans)
            for at in range(end, start)]  # fmt: skip
    rows = []
    for line in lines[first + 2 :]:
        if not line.strip() or any(line[at : at + 1].strip() for at in gaps):
            break
        rows.append([line[start:end].strip() for start, end in spans])
    return rows


def read_facts(text: str, title: str) -> dict[str, str]:
    """Return the facts under the line that begins with ``title``, by name; each on one line."""
    lines = text[text.index(f"\n{title}") + 1 :].split("\n\n")[0].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("  "))
    facts, name = {}, ""
    for line in lines[first:]:
        if not line.startswith("   "):
            name, value = re.split(" {2,}", line.strip(), maxsplit=1)
            facts[name] = value
        else:
            facts[name] += f" {line.strip()}"
    return facts


def shows(text: str, *values: float) -> bool:
    """Return whether the numbers in ``text``, in order, are ``values``, rounded as printed."""
    found = NUMBER.findall(text)
    return len(found) == len(values) and all(map(_is_rounded, found, values))


def _is_rounded(text: str, value: float) -> bool:
    digits = text.replace(",", "")
    if "e" in digits:  # 3e-05: to the digits of its mantissa
        return float(f"{value:.{len(digits.partition('e')[0].partition('.')[2])}e}") == float(
            digits
        )
    step = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) - value) <= step / 2 * (1 + 1e-6) + 1e-12
