"""Several processes: who takes what, what they exchange, and what happens when one is lost."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import cli, device
from common.cli import UserError
from common.workers import ALONE, Workers, join_workers

CPU = torch.device("cpu")

PROLOGUE = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path

import torch
from common import cli, device, workers
from common.cli import UserError
from common.data import Cifar10
from common.evaluate import predict
from common.model import ResNet18

@cli.exit_codes
def main(argv=None):
    cli.set_up_messages(quiet=False)
    with workers.join_workers(torch.device("cpu")) as crew:
"""


@pytest.fixture
def together(tmp_path, torchrun):
    """Run the lines of a program in two processes, after they have met."""

    def run(lines: str, *arguments: object):
        body = "".join(f"        {line}\n" for line in lines.strip().splitlines())
        program = tmp_path / "program.py"
        program.write_text(f"{PROLOGUE}{body}    return 0\n\nsys.exit(main())\n")
        return torchrun(program, *arguments)

    return run


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
            assert device.set_threads(None) == share
            torch.set_num_threads(threads)
        assert device.set_threads(3) == 3
        torch.set_num_threads(threads)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's
        assert device.set_threads(None) == threads
    finally:
        torch.set_num_threads(threads)


# --- two processes -------------------------------------------------------------------------------


def test_two_processes_exchange_and_predict_what_one_does(together, tmp_path):
    done = together(
        """
torch.manual_seed(0)
model = ResNet18((4, 8, 8, 8)).eval()
images = Cifar10(torch.randint(0, 256, (22, 3, 32, 32), dtype=torch.uint8), torch.arange(22) % 10)
torch.set_num_threads(1)
found = {
    "rank": crew.rank,
    "gathered": crew.gather(10 + crew.rank),
    "sent": crew.broadcast("from the first" if crew.is_first else None),
    "sum": crew.sum(torch.tensor([1.0 + crew.rank])).item(),
    "equal": torch.equal(predict(model, images, 4, "", crew), predict(model, images, 4)),
    "few": torch.equal(predict(model, images.rows(slice(1)), 4, "", crew),
                       predict(model, images.rows(slice(1)), 4)),
}
cli.log.warning("from %d", crew.rank)
order = Path(sys.argv[1]) / "order"
with crew.one_a_machine_first():
    if crew.is_first:
        time.sleep(0.5)
    with order.open("a") as file:
        file.write(str(crew.rank))
try:
    crew.require_same({"the images": crew.rank, "torch": 1})
except UserError as error:
    found["refused"] = str(error)
(Path(sys.argv[1]) / f"{crew.rank}.json").write_text(json.dumps(found))
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["gathered"] == [10, 11]
        assert found["sent"] == "from the first"
        assert found["sum"] == 3.0
        assert found["equal"]
        assert found["few"]
        assert found["refused"] == f"processes {rank} and {1 - rank} differ in the images"
    assert (tmp_path / "order").read_text() == "01"
    assert "warning: from 0" in done.stderr
    assert "from 1" not in done.stderr


@pytest.mark.parametrize(
    ("lines", "lost"),
    [
        ("if not crew.is_first: os.kill(os.getpid(), signal.SIGKILL)", True),
        ("if not crew.is_first: raise UserError('no such folder')", True),
        ("if crew.is_first: raise UserError('no such folder')", False),
    ],
    ids=["killed", "failed", "first-failed"],
)
def test_a_process_that_ends_ends_the_run(together, lines, lost):
    started = time.monotonic()
    done = together(f"crew.gather(1)\n{lines}\ncrew.gather(2)\ntime.sleep(600)")
    assert time.monotonic() - started < 300
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = ["error: another process of this run ended, or no longer answers"] * lost
    expected += ["error: no such folder"] * ("folder" in lines)
    assert sorted(told) == expected
    assert "program.py" not in done.stderr.partition("FAILED")[0].partition("Traceback")[0]


def test_a_process_that_falls_silent_ends_the_run(tmp_path, torchrun):
    program = tmp_path / "program.py"
    body = PROLOGUE.replace("    with", "    workers.TIMEOUT = timedelta(seconds=5)\n    with")
    body += "        crew.gather(1)\n        time.sleep(60 * crew.rank)\n        crew.gather(2)\n"
    program.write_text(f"{body}    return 0\n\nsys.exit(main())\n")
    done = torchrun(program)
    assert done.returncode == 1
    assert "error: another process of this run ended, or no longer answers\n" in done.stderr


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
