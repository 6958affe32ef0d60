"""A run's story on one page: report.html, a single file that needs no network and no JavaScript.

Everything is escaped, as file names come from outside, and the page forbids the browser to load or
run anything.
"""

import base64
from collections.abc import Mapping
from pathlib import Path

from common.command.cli import visible
from common.files.atomic import replace_file
from common.files.output import RESULTS_NAME, OutputFolder
from common.report.story import Story, list_files

REPORT_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(story: Story, results: dict, folder: OutputFolder) -> None:
    """Write report.html beside the plots that it embeds, and name it in the results."""
    results["artifacts"]["report"] = REPORT_NAME
    plots = {name: folder.file(name).read_bytes() for name in results["artifacts"]["plots"]}
    page = render(story, results, plots)
    replace_file(folder.file(REPORT_NAME), page.encode())


def render(story: Story, results: Mapping[str, object], plots: Mapping[str, bytes]) -> str:
    """Return the page; ``plots`` holds a PNG for each file name."""
    import jinja2  # late: a run without a page does not wait for it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, finalize=_as_text,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    told_first = [name for name in dict.fromkeys([*story.captions, *plots]) if name in plots]
    images = {name: base64.b64encode(plots[name]).decode() for name in told_first}
    template = environment.get_template(TEMPLATE.name)
    files = [RESULTS_NAME, *list_files(results["artifacts"])]
    return template.render(story=story, results=results, images=images, files=files).lstrip()


def _as_text(value: object) -> object:
    """Return a value as text without invisible characters; markup stays as it is."""
    if hasattr(value, "__html__"):
        return value
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return visible(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
