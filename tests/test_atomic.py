"""Files that are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from common.files.atomic import replace_file


def test_replace_file_keeps_the_old_one_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    replace_file(path, b"old")

    def fail(_: int) -> None:
        raise ValueError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="no space"):
        replace_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_the_file_gets_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError, match="too large") as failed:
        replace_file(tmp_path / "file", bytes(10_000))
    assert failed.value.filename == "file"
    assert list(tmp_path.iterdir()) == []
