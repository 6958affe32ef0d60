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


def arguments(output_dir: Path, report: bool = False, json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(
        threads=None, device="cpu", output_dir=output_dir, overwrite=False, report=report, json=json
    )


def results() -> dict:
    return {
        "arguments": {}, "environment": {}, "weights": {}, "data": {}, "artifacts": {"plots": []},
    }  # fmt: skip


@pytest.mark.parametrize("with_page", [False, True])
def test_a_finished_run_leaves_its_results(tmp_path, monkeypatch, with_page):
    story = Story("Title", "Setting", [], [])
    monkeypatch.setattr(page, "render", lambda story, results, plots: story.title)
    found, args = results(), arguments(tmp_path, report=with_page)
    with run.start_run(args) as (crew, folder):
        assert (crew.count, crew.is_first) == (1, True)
        run.finish_run(found, folder, time.perf_counter() - 2, lambda results: story, args)
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
    monkeypatch.setattr(run, "join_workers", lambda *_: contextlib.nullcontext(second))
    with run.start_run(arguments(tmp_path / "out")) as (crew, folder):
        assert crew is second
        assert folder is None
    assert not (tmp_path / "out").exists()


def test_json_is_printed_in_place_of_the_story(capsys, tmp_path):
    story = Story("Title", "Setting", [], ["a is 1"])
    for as_json in (False, True):
        args, found = arguments(tmp_path, json=as_json), results()
        with run.start_run(args) as (_, folder):
            run.finish_run(found, folder, time.perf_counter(), lambda results: story, args)
        expected = (tmp_path / "results.json").read_text() if as_json else story.text(tmp_path)
        assert capsys.readouterr().out == expected
