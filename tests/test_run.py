"""A run's start and end: who opens the folder, what is written, what is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from common import run
from common.machine.workers import Workers
from common.report import page
from common.report.story import Story

CPU = torch.device("cpu")


def arguments(output_dir: Path) -> argparse.Namespace:
    return argparse.Namespace(threads=None, device="cpu", output_dir=output_dir, overwrite=False)


def results() -> dict:
    return {
        "arguments": {}, "environment": {}, "weights": {}, "data": {}, "artifacts": {"plots": []},
    }  # fmt: skip


@pytest.mark.parametrize("with_page", [False, True])
def test_a_finished_run_leaves_its_results(tmp_path, monkeypatch, with_page):
    story = Story("Title", "Setting", [], [])
    monkeypatch.setattr(page, "render", lambda story, results, plots: story.title)
    found = results()
    with run.start_run(arguments(tmp_path)) as (crew, folder):
        assert (crew.count, crew.is_first) == (1, True)
        assert (
            run.finish_run(found, folder, time.perf_counter() - 2, lambda results: story, with_page)
            is story
        )
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert 2 <= found["wall_seconds"] < 60
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 50e6
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json"} | ({"report.html"} if with_page else set())
    assert found["artifacts"].get("report") == ("report.html" if with_page else None)


def test_a_run_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with run.start_run(arguments(tmp_path / "out")) as (_, folder):
            folder.file("model.pth").touch()
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert not (tmp_path / "out").exists()


def test_the_first_process_alone_opens_the_folder(tmp_path, monkeypatch):
    second = Workers(CPU, rank=1, count=2)
    monkeypatch.setattr(run, "join_workers", lambda device: contextlib.nullcontext(second))
    with run.start_run(arguments(tmp_path / "out")) as (crew, folder):
        assert crew is second
        assert folder is None
    assert not (tmp_path / "out").exists()


def test_json_is_printed_in_place_of_the_story(capsys, tmp_path):
    story = Story("Title", "Setting", [], ["a is 1"])
    run.print_results({"a": 1}, story, tmp_path, as_json=False)
    assert capsys.readouterr().out == story.text(tmp_path)
    run.print_results({"a": 1}, story, tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
