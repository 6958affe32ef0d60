"""A run from its start to its end: the processes that share it, and the results that it leaves."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common.files.atomic import replace_file
from common.files.output import RESULTS_NAME, OutputFolder
from common.machine.device import peak_memory_bytes
from common.machine.workers import Workers, join_workers
from common.report.page import write_page
from common.report.results import to_json
from common.report.story import Story


@contextlib.contextmanager
def start_run(
    device: torch.device, output_dir: Path, overwrite: bool
) -> Iterator[tuple[Workers, OutputFolder | None]]:
    """Join the processes that share the run; the first of them opens the output folder.

    Yields:
        The processes, and the folder: None in all but the first.
    """
    with join_workers(device) as workers:
        if not workers.is_first:
            yield workers, None
            return
        with OutputFolder(output_dir, overwrite) as folder:
            yield workers, folder


def finish_run(
    results: dict, folder: OutputFolder, started: float, tell: Callable[[dict], Story],
    with_page: bool = False,
) -> Story:  # fmt: skip
    """Add what the run has cost, write results.json, and move everything into place.

    Args:
        results: Content of results.json; changed in place.
        folder: Folder with the run's other files.
        started: Value of ``time.perf_counter()`` at the start.
        tell: Function that returns the story of finished results.
        with_page: Whether to write report.html too.
    """
    results["wall_seconds"] = time.perf_counter() - started
    results["peak_memory_bytes"] = peak_memory_bytes()
    story = tell(results)
    if with_page:
        write_page(story, results, folder)
    text = to_json(results)
    replace_file(folder.file(RESULTS_NAME), lambda file: file.write(text.encode()))
    folder.commit()
    return story


def print_results(results: dict, story: Story, output_dir: Path, as_json: bool) -> None:
    """Print the story, or results.json in its place."""
    print(to_json(results) if as_json else story.text(output_dir), end="")
