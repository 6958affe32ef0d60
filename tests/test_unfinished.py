"""What an unfinished run leaves: used by the same run alone, and never lost."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from common.command.cli import UserError
from common.files import unfinished
from common.files.atomic import STAGING_PREFIX
from common.files.unfinished import SCRIPT, PartialResults

IDENTITY = {"the seed": 0, "the images": "abc"}


@pytest.fixture
def left(tmp_path, monkeypatch) -> Path:
    """The folder of a run that finished two pieces and a file."""
    monkeypatch.setattr("sys.argv", ["script", "--seed", "0"])
    kept = PartialResults(tmp_path / "unfinished", IDENTITY, resume=False)
    kept["first"] = {"correct": "ff"}
    kept["second"] = {"bounds": [0.5]}
    (kept.folder / "model.pth").write_text("weights")
    kept.leave()
    return kept.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_run_finds_all(left, overwrite):
    again = PartialResults(left, IDENTITY, resume=True, overwrite=overwrite)
    assert dict(again) == {"first": {"correct": "ff"}, "second": {"bounds": [0.5]}}
    assert (left / "model.pth").read_text() == "weights"


def test_another_run_or_one_that_did_not_ask_destroys_nothing(left):
    before = contents(left)
    with pytest.raises(UserError, match=r"unfinished: left by a run that differs in the seed;"):
        PartialResults(left, IDENTITY | {"the seed": 1}, resume=True)
    with pytest.raises(UserError, match=r"resume it as it was started \(script --seed 0\), or"):
        PartialResults(left, IDENTITY | {"the seed": 1}, resume=True)
    with pytest.raises(UserError, match="differs in the epochs and the images;"):
        PartialResults(left, {"the seed": 0, "the epochs": 2}, resume=True)
    with pytest.raises(UserError, match="differs in the script;"):  # which says enough
        PartialResults(left, {SCRIPT: "another", "the epochs": 2}, resume=True)
    with pytest.raises(UserError, match="continue it with --resume or discard it with --overwrite"):
        PartialResults(left, IDENTITY, resume=False)
    assert contents(left) == before


def test_overwriting_starts_afresh(left):
    assert not PartialResults(left, {"the seed": 1}, resume=False, overwrite=True)
    assert [path.name for path in left.iterdir()] == ["identity.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_pieces_needs_no_flag_and_goes(tmp_path, resume):
    PartialResults(tmp_path / "unfinished", IDENTITY, resume=False)  # and killed
    assert not PartialResults(tmp_path / "unfinished", {"another": 1}, resume)
    PartialResults(tmp_path / "unfinished", IDENTITY, resume=False).leave()
    assert list(tmp_path.iterdir()) == []


def sealed(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x} ".encode() + text


DAMAGE = [
    b"",
    b"[1, 2]",
    b"00000000 ",
    b"\xff\xfe",
    b"ffffffff {}",
    sealed(b"{"),
    sealed(b"[" * 9999),
    sealed(b"null"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_piece_is_not_finished(left, damage):
    (left / "first.json").write_bytes(damage)
    again = PartialResults(left, IDENTITY, resume=True)
    assert dict(again) == {"second": {"bounds": [0.5]}}
    again["first"] = {"correct": "ff"}
    assert PartialResults(left, IDENTITY, resume=True)["first"] == {"correct": "ff"}


@pytest.mark.parametrize("damage", [b"00000000 {}", sealed(b"{"), sealed(b"[3]")])
def test_a_damaged_identity_is_told_and_can_be_discarded(left, damage):
    (left / "identity.json").write_bytes(damage)
    with pytest.raises(UserError, match="damaged; start anew with --overwrite instead"):
        PartialResults(left, IDENTITY, resume=True)
    PartialResults(left, IDENTITY, resume=False, overwrite=True)


def test_a_kill_while_it_is_discarded_blocks_nothing(left, monkeypatch):
    """The folder goes in one step, so that none is left that nobody could tell from another's."""
    monkeypatch.setattr(unfinished.shutil, "rmtree", lambda *_, **__: None)
    PartialResults(left, {"another": 1}, resume=False, overwrite=True)
    assert [path.name for path in left.iterdir()] == ["identity.json"]
    (trash,) = left.parent.glob(f"{STAGING_PREFIX}*")  # which the next run sweeps
    assert (trash / "unfinished" / "first.json").exists()


def test_where_it_cannot_begin_nothing_is_left(tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError, match="too large"):
        PartialResults(tmp_path / "unfinished", {"long": "x" * 10_000}, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_swept(left):
    (left / ".model.pth-abc").write_text("half")
    PartialResults(left, IDENTITY, resume=True)
    assert not (left / ".model.pth-abc").exists()


def test_a_piece_that_was_cut_off_leaves_the_one_before(left, full_disk):
    again = PartialResults(left, IDENTITY, resume=True)
    with full_disk(), pytest.raises(OSError, match="too large"):
        again["first"] = {"correct": "f" * 10_000}
    assert PartialResults(left, IDENTITY, resume=True)["first"] == {"correct": "ff"}


@pytest.mark.parametrize("name", ["thesis.tex", "identity.key", ".env", "identity.json", None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_left_stays(tmp_path, name, overwrite):
    folder = tmp_path / "unfinished"
    if name is not None:
        folder.mkdir()
    mine = folder if name is None else folder / name
    mine.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="unfinished: in the way: no run left it"):
        PartialResults(folder, IDENTITY, resume=False, overwrite=overwrite)
    assert mine.read_text() == '{"mine": 1}'


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
    PartialResults(tmp_path / "unfinished", IDENTITY, resume=False)["piece"] = {}
    assert moved == ["identity.json", "piece.json"]
