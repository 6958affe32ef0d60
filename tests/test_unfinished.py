"""What an unfinished run leaves: used by the same run alone, and never lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.command.cli import UserError
from common.files.unfinished import Unfinished

IDENTITY = {"the seed": 0, "the images": "abc"}


@pytest.fixture
def left(tmp_path) -> Path:
    """The folder of a run that finished two pieces and a file."""
    unfinished = Unfinished(tmp_path / "unfinished", IDENTITY, resume=False)
    unfinished["first"] = {"correct": "ff"}
    unfinished["second"] = [0.5]
    (unfinished.folder / "model.pth").write_text("weights")
    unfinished.leave()
    return unfinished.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_run_finds_all(left, overwrite):
    again = Unfinished(left, IDENTITY, resume=True, overwrite=overwrite)
    assert dict(again) == {"first": {"correct": "ff"}, "second": [0.5]}
    assert (left / "model.pth").read_text() == "weights"
    again.discard()
    assert not left.exists()


def test_another_run_or_one_that_did_not_ask_destroys_nothing(left):
    before = contents(left)
    with pytest.raises(UserError, match=r"unfinished: left by a run that differs in the seed;"):
        Unfinished(left, IDENTITY | {"the seed": 1}, resume=True)
    with pytest.raises(UserError, match="differs in the epochs and the images;"):
        Unfinished(left, {"the seed": 0, "the epochs": 2}, resume=True)
    with pytest.raises(UserError, match="continue it with --resume or discard it with --overwrite"):
        Unfinished(left, IDENTITY, resume=False)
    assert contents(left) == before


def test_overwriting_starts_afresh(left):
    assert not Unfinished(left, {"the seed": 1}, resume=False, overwrite=True)
    assert [path.name for path in left.iterdir()] == ["identity.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_where_nothing_was_finished_nothing_is_asked(tmp_path, resume):
    Unfinished(tmp_path / "unfinished", IDENTITY, resume=False)  # and killed
    assert not Unfinished(tmp_path / "unfinished", {"another": 1}, resume)
    Unfinished(tmp_path / "unfinished", IDENTITY, resume=False).leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"[1, 2]", b"00000000 ", b"\xff\xfe", b"ffffffff {}"])
def test_a_damaged_piece_is_not_finished(left, damage):
    (left / "first.json").write_bytes(damage)
    again = Unfinished(left, IDENTITY, resume=True)
    assert dict(again) == {"second": [0.5]}
    again["first"] = {"correct": "ff"}
    assert Unfinished(left, IDENTITY, resume=True)["first"] == {"correct": "ff"}


def test_a_damaged_identity_is_told(left):
    (left / "identity.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="damaged; start anew with --overwrite"):
        Unfinished(left, IDENTITY, resume=True)


def test_a_piece_that_was_cut_off_leaves_the_one_before(left, full_disk):
    again = Unfinished(left, IDENTITY, resume=True)
    with full_disk(), pytest.raises(OSError, match="too large"):
        again["first"] = "f" * 10_000
    assert Unfinished(left, IDENTITY, resume=True)["first"] == {"correct": "ff"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_that_name_that_no_run_left_stays(tmp_path, overwrite):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="unfinished: in the way: no run left it"):
        Unfinished(tmp_path / "unfinished", IDENTITY, resume=False, overwrite=overwrite)
    assert (tmp_path / "unfinished" / "thesis.tex").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which files are open")
def test_files_take_their_places_while_closed_as_windows_demands(tmp_path, monkeypatch):
    def open_files():
        return {os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}

    replace, moved = Path.replace, []

    def checked(path, target):
        assert os.path.realpath(path) not in open_files()
        moved.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", checked)
    Unfinished(tmp_path / "unfinished", IDENTITY, resume=False)["piece"] = 1
    assert moved == ["identity.json", "piece.json"]
