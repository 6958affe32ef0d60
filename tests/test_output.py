"""The output folder: complete or not at all, however a run ends."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from processes import REPOSITORY, Copy, foreground_signals

from common.command import cli
from common.command.cli import UserError
from common.files import output
from common.files.atomic import replace_file
from common.files.output import (
    EARLIER_NAME,
    OUR_ENTRIES,
    RESULTS_NAME,
    STAGING_PREFIX,
    UNFINISHED_NAME,
    OutputFolder,
)

OURS = dict.fromkeys(OUR_ENTRIES, 1)


def run(
    path: Path,
    version: str,
    names: tuple[str, ...] = ("model.pth",),
    overwrite: bool = False,
    piece: str | None = None,
) -> None:
    """Write files that hold ``version``, and a results.json that lists them; finish a piece."""
    with OutputFolder(path, overwrite) as folder:
        if piece is not None:
            folder.keep_unfinished({}, resume=True)[piece] = {}
        for name in names:
            folder.file(name).write_text(version)
        listed = {"model": names[0], "plots": list(names[1:])} if names else {}
        results = OURS | {"artifacts": listed, "version": version}
        folder.file(RESULTS_NAME).write_text(json.dumps(results))
        folder.commit()


def fail(path: Path, failure: type[BaseException], **options: object) -> None:
    """Write a file, then raise."""
    with OutputFolder(path, **options) as folder:
        folder.file("model.pth").write_text("new")
        raise failure("half-way")


def read(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def test_results_appear_at_commit(tmp_path):
    path = tmp_path / "a" / "b"
    with OutputFolder(path) as folder:
        folder.file("model.pth").write_text("1")
        assert not (path / "model.pth").exists()
        folder.commit()
        assert (path / "model.pth").read_text() == "1"
    assert read(path) == {"model.pth": "1"}


def test_results_json_goes_last(tmp_path, monkeypatch):
    order = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append(b.name), rename(a, b))[1])
    run(tmp_path, "1", ("a.png", "model.pth", "z.png"), piece="first")
    # A kill before the very end leaves what was finished to resume from.
    assert order == ["a.png", "model.pth", "z.png", RESULTS_NAME, UNFINISHED_NAME]


@pytest.mark.parametrize("failure", [ValueError, UserError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_no_trace(tmp_path, failure):
    with pytest.raises(failure):
        fail(tmp_path / "a" / "b", failure)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_earlier_results(tmp_path):
    run(tmp_path, "1")
    before = read(tmp_path)
    with pytest.raises(ValueError, match="half-way"):
        fail(tmp_path, ValueError, overwrite=True)
    assert read(tmp_path) == before


def test_earlier_results_are_set_aside(tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    for version in "123":
        run(tmp_path, version, ("model.pth", f"plot{version}.png"))
    (tmp_path / EARLIER_NAME).rename(tmp_path / "kept")
    assert set(read(tmp_path)) - {f for f in read(tmp_path) if f.startswith("kept")} == {
        "model.pth", "plot3.png", RESULTS_NAME,
    }  # fmt: skip
    earlier = sorted((tmp_path / "kept").iterdir())
    versions = [json.loads((folder / RESULTS_NAME).read_text())["version"] for folder in earlier]
    assert sorted(versions) == ["1", "2"]
    for folder, version in zip(earlier, versions, strict=True):
        assert set(read(folder)) == {"model.pth", f"plot{version}.png", RESULTS_NAME}
        assert (folder / "model.pth").read_text() == version
    assert capsys.readouterr().err.count("earlier results moved to") == 2


def test_earlier_results_of_one_second_find_a_free_name(tmp_path, monkeypatch):
    monkeypatch.setattr(output.time, "strftime", lambda *_: "now")
    for version in "123":
        run(tmp_path, version)
    archives = tmp_path / EARLIER_NAME
    shutil.rmtree(archives / "now")  # by hand
    run(tmp_path, "4")
    run(tmp_path, "5")
    versions = {p.name: (p / "model.pth").read_text() for p in archives.iterdir()}
    assert versions == {"now": "3", "now_1": "2", "now_2": "4"}


def test_overwrite_replaces_all_of_an_earlier_run(tmp_path):
    run(tmp_path, "1", ("model.pth", "only-earlier.png"))
    run(tmp_path, "2", overwrite=True)
    assert set(read(tmp_path)) == {"model.pth", RESULTS_NAME}
    assert (tmp_path / "model.pth").read_text() == "2"


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_stay_where_they_are(tmp_path, overwrite):
    """Somebody's ``--output-dir .`` is a folder full of other things."""
    others = {".bashrc": "mine", "thesis.tex": "mine", "data/x.png": "mine"}
    (tmp_path / "data").mkdir()
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    for version in "12":
        run(tmp_path, version, overwrite=overwrite)
    assert others.items() <= read(tmp_path).items()


def test_a_foreign_file_of_the_same_name_is_not_lost(tmp_path):
    (tmp_path / "model.pth").write_text("mine")
    run(tmp_path, "1")
    (archived,) = (tmp_path / EARLIER_NAME).iterdir()
    assert read(archived) == {"model.pth": "mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_finished_outlives_a_run_that_fails(tmp_path, overwrite):
    """The next run goes on with it, and one that is complete leaves nothing of it."""
    identity = {"the seed": 0}

    def work(resume, fails):
        with OutputFolder(tmp_path, overwrite) as folder:
            finished = folder.keep_unfinished(identity, resume)
            found = dict(finished)
            finished["piece"] = {"n": 3}
            if fails:
                raise ValueError("midway")
            folder.file(RESULTS_NAME).write_text(json.dumps(OURS | {"artifacts": {}}))
            folder.commit()
        return found

    run(tmp_path, "1")
    before = read(tmp_path)
    with pytest.raises(ValueError, match="midway"):
        work(resume=False, fails=True)
    assert before.items() <= read(tmp_path).items()
    assert (tmp_path / UNFINISHED_NAME).is_dir()
    assert work(resume=True, fails=False) == {"piece": {"n": 3}}
    assert not (tmp_path / UNFINISHED_NAME).exists()


def test_where_nothing_is_finished_nothing_is_left(tmp_path):
    def fail():
        with OutputFolder(tmp_path / "out") as folder:
            folder.keep_unfinished({}, resume=False)
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[1", b"[]", b"{}", b"\xff", b'{"artifacts": 3}', b'{"artifacts": {"model": null}}',
     b'{"artifacts": {"model": "../precious"}}', b'{"artifacts": ["..", ".", "", "/etc/passwd"]}'],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_strange_results_json_does_no_harm(tmp_path, content, overwrite):
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "results"
    path.mkdir()
    (path / RESULTS_NAME).write_bytes(content)
    run(path, "1", overwrite=overwrite)
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((path / RESULTS_NAME).read_text())["version"] == "1"


def test_overwrite_deletes_nothing_that_another_program_lists(tmp_path):
    others = {
        "thesis.tex": "mine",
        "model.pth": "mine",
        RESULTS_NAME: '{"artifacts": {"a": "thesis.tex"}}',
    }
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    run(tmp_path, "1", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    (archived,) = (tmp_path / EARLIER_NAME).iterdir()
    assert read(archived) == {n: t for n, t in others.items() if n != "thesis.tex"}


def test_what_marks_our_results_is_what_the_schema_requires():
    schema = json.loads((REPOSITORY / "docs" / "results.schema.json").read_text())
    assert {*schema["required"]} == OUR_ENTRIES


def test_files_get_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        run(tmp_path, "1")
    finally:
        os.umask(before)
    for name in ("model.pth", RESULTS_NAME):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


# --- things in the way ---------------------------------------------------------------------------


def test_a_file_named_earlier_is_found_before_the_work(tmp_path):
    (tmp_path / EARLIER_NAME).write_text("mine")
    with pytest.raises(UserError, match="earlier: in the way"), OutputFolder(tmp_path):
        pytest.fail("the work has begun")
    assert read(tmp_path) == {EARLIER_NAME: "mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_named_like_a_result_is_moved_aside(tmp_path, overwrite):
    run(tmp_path, "1", ("a.png", "z.png"))
    (tmp_path / "model.pth").mkdir()
    (tmp_path / "model.pth" / "thesis.tex").write_text("mine")
    run(tmp_path, "2", ("a.png", "model.pth", "z.png"), overwrite=overwrite)
    assert (tmp_path / "model.pth").read_text() == "2"
    (archived,) = (tmp_path / EARLIER_NAME).iterdir()
    assert (archived / "model.pth" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_commit_that_fails_at_any_step_is_undone(tmp_path, monkeypatch, overwrite):
    path = tmp_path / "results"
    run(path, "1", ("a.png", "model.pth"))
    before, rename = read(path), Path.rename
    for step in range(7):  # three earlier files out of the way, three new ones, what is unfinished
        steps = iter(range(step + 1))

        def fail(source: Path, target: Path, steps=steps, step=step) -> None:
            if next(steps, None) == step:
                raise OSError(28, "No space left on device")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(OSError, match="No space"):
                run(path, "2", ("a.png", "model.pth"), overwrite, piece=f"step-{step}")
        left = read(path)
        assert f"{UNFINISHED_NAME}/step-{step}.json" in left
        assert {n: t for n, t in left.items() if UNFINISHED_NAME not in n} == before
    run(path, "2", ("a.png", "model.pth"), overwrite, piece="last")
    assert (path / "model.pth").read_text() == "2"
    assert not (path / UNFINISHED_NAME).exists()


# --- several runs --------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(tmp_path):
    code = (
        "import sys; from pathlib import Path; from common.files.output import OutputFolder\n"
        "with OutputFolder(Path(sys.argv[1])) as folder:\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(UserError, match="in use by another run"), OutputFolder(tmp_path):
            pass
        (staging,) = tmp_path.glob(f"{STAGING_PREFIX}*")  # the other's: not ours to remove
        other.kill()  # the lock goes with the process, whose folder stays
    assert staging.exists()
    run(tmp_path, "1")
    assert set(read(tmp_path)) == {"model.pth", RESULTS_NAME}
    assert not staging.exists()


def test_where_folders_cannot_be_locked_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")  # what Linux says of a folder on NFS

    monkeypatch.setattr(output.fcntl, "flock", unsupported)
    cli.set_up_messages(quiet=True)
    (tmp_path / f"{STAGING_PREFIX}other").mkdir()
    run(tmp_path, "1")
    assert (tmp_path / f"{STAGING_PREFIX}other").exists()  # perhaps of a run that goes on
    assert "cannot be locked" in capsys.readouterr().err


# --- full disks ----------------------------------------------------------------------------------


def test_too_little_space_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(UserError, match="MB are needed"), OutputFolder(tmp_path / "results"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_earlier_results(tmp_path, full_disk):
    run(tmp_path, "1")
    before = read(tmp_path)

    def fill() -> None:
        with OutputFolder(tmp_path, overwrite=True) as folder:
            folder.file("model.pth").write_text("2")
            replace_file(folder.file(RESULTS_NAME), bytes(10_000))
            folder.commit()

    with full_disk(), pytest.raises(OSError, match="too large") as full:
        fill()
    assert cli.user_message(full.value) == "results.json: File too large"
    assert read(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_results_that_are_nested_without_end_are_none_of_ours(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    run(tmp_path, "1", overwrite=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no other file system at hand")
def test_earlier_results_are_not_taken_to_another_file_system(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "earlier").symlink_to(elsewhere)
        with pytest.raises(UserError, match="could not be moved there"):
            run(tmp_path, "1")
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


# --- signals -------------------------------------------------------------------------------------

PLOTS = [f"plot{index}.png" for index in range(20)]


@cli.exit_codes
def run_endlessly(argv: list[str]) -> int:
    for version in itertools.count():
        run(Path(argv[0]), str(version), ("model.pth", *PLOTS), overwrite=argv[1] == "overwrite")
    return cli.EXIT_DONE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("mode", ["overwrite", "archive"])
def test_killed_at_any_moment(tmp_path, number, mode):
    """Results and results.json are of one run; but for SIGKILL nothing half-done is left at all."""
    moments = random.Random(f"{number} {mode}")
    for attempt in range(3):
        path = tmp_path / str(attempt)
        with Copy(run_endlessly, path, mode, output=tmp_path / "told") as copy:
            while not path.exists():
                assert copy.wait(0.001) is None
            copy.wait(moments.uniform(0, 0.15))
            copy.send(number)
            done = copy.wait()
        if number == signal.SIGKILL:
            assert done.returncode == -signal.SIGKILL
        else:
            assert (done.returncode, done.stderr) == (cli.EXIT_INTERRUPTED, "interrupted\n")
            assert not list(path.glob(".*"))
        if (path / RESULTS_NAME).exists():
            version = json.loads((path / RESULTS_NAME).read_text())["version"]
            assert {p.read_text() for p in path.glob("*.png")} == {version}
            assert len(list(path.glob("*.png"))) == 20
        else:
            assert number == signal.SIGKILL or not path.exists() or not list(path.glob("*.png"))


def test_signals_wait_for_the_end_of_a_commit(tmp_path, monkeypatch):
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rename(source, target)

    with foreground_signals():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, "1")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert set(read(tmp_path)) == {"model.pth", RESULTS_NAME}


def test_other_threads_may_write_results(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, "1"))
    thread.start()
    thread.join()
    assert set(read(tmp_path)) == {"model.pth", RESULTS_NAME}
