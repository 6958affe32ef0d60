"""Several processes: who takes what, what they exchange, and what happens when one is lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_together

from common.command import cli
from common.command.cli import UserError
from common.machine import device, workers
from common.machine.workers import ALONE, Workers, join_workers

CPU = torch.device("cpu")


def together(does, folder):
    """Run ``does`` in two processes, after they have met; it gets their Workers."""

    @cli.exit_codes
    def main(argv):
        cli.set_up_messages(quiet=False)
        with join_workers(CPU) as crew:
            does(crew)
        return cli.EXIT_DONE

    return run_together(main, output=folder / "told")


# --- shares --------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 50), length=st.integers(0, 500), unit=st.integers(1, 64),
    count=st.integers(1, 9),
)  # fmt: skip
def test_shares_are_disjoint_whole_batches_as_one_process_makes_them(start, length, unit, count):
    stop = start + length
    shares = [
        list(range(stop))[Workers(CPU, rank, count).share_of(start, stop, unit)]
        for rank in range(count)
    ]
    assert list(itertools.chain(*shares)) == list(range(start, stop))
    for share in shares:  # begins where a batch of one process would begin
        assert not share or (share[0] - start) % unit == 0
    sizes = [-(-len(share) // unit) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_exchanges_nothing():
    assert ALONE.gather("x") == ["x"]
    assert ALONE.broadcast("x") == "x"
    assert ALONE.is_first
    ALONE.require_same({"the images": 1})
    with ALONE.one_a_machine_first():
        pass


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(device, "_usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    try:
        for processes, share in ((1, threads), (2, 4), (3, 2), (16, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            device.set_up_cpu(None)
            assert torch.get_num_threads() == share
            torch.set_num_threads(threads)
        device.set_up_cpu(3)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(threads)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's
        device.set_up_cpu(None)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


# --- two processes -------------------------------------------------------------------------------


def exchange(crew, folder: Path):
    found = {
        "rank": crew.rank,
        "gathered": crew.gather(10 + crew.rank),
        "sent": crew.broadcast("from the first" if crew.is_first else None),
    }
    cli.log.warning("from %d", crew.rank)
    with crew.one_a_machine_first():
        if crew.is_first:
            time.sleep(0.2)
        with (folder / "order").open("a") as file:
            file.write(str(crew.rank))
    try:
        crew.require_same({"the images": crew.rank, "torch": 1})
    except UserError as error:
        found["refused"] = str(error)
    (folder / f"{crew.rank}.json").write_text(json.dumps(found))


def test_two_processes_exchange_what_each_has(tmp_path):
    first, second = together(lambda crew: exchange(crew, tmp_path), tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["rank"] == rank
        assert found["gathered"] == [10, 11]
        assert found["sent"] == "from the first"
        assert found["refused"] == f"processes {rank} and {1 - rank} differ in the images"
    assert (tmp_path / "order").read_text() == "01"
    assert first.stderr == "warning: from 0\n"
    assert second.stderr == ""


@pytest.mark.parametrize("how", ["killed", "failed", "first-failed"])
def test_a_process_that_ends_ends_the_run(how, tmp_path):
    def work(crew):
        crew.gather(1)
        if crew.is_first == (how == "first-failed"):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("no such folder")
        crew.gather(2)
        time.sleep(600)

    started = time.monotonic()
    first, second = together(work, tmp_path)
    assert time.monotonic() - started < 300
    lost = "error: another process of this run ended, or no longer answers\n"
    failed = "error: no such folder\n"
    expected = {
        "killed": ((1, lost), (-signal.SIGKILL, "")),
        "failed": ((1, lost), (1, failed)),
        "first-failed": ((1, failed), (1, "")),  # the first alone says that it lost another
    }[how]
    assert ((first.returncode, first.stderr), (second.returncode, second.stderr)) == expected


def test_a_process_that_falls_silent_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT", timedelta(seconds=5))

    def work(crew):
        crew.gather(1)
        while not crew.is_first and not (tmp_path / "told-0.err").read_text():
            time.sleep(0.1)
        crew.gather(2)

    first, second = together(work, tmp_path)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr == "error: another process of this run ended, or no longer answers\n"


def test_processes_cannot_share_an_apple_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="one process; start without torchrun"),
        join_workers(torch.device("mps")),
    ):
        pass


def test_processes_that_cannot_meet_are_told(monkeypatch, capsys):
    @cli.exit_codes
    def main(argv=None):
        with join_workers(CPU):
            pass

    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main([]) == cli.EXIT_FAILED
    error = capsys.readouterr().err
    assert error.startswith("error: the processes cannot meet: ")
    assert error.count("\n") == 1
