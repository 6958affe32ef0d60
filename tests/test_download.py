"""The download of CIFAR-10 and the reading of its archive, from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from common.command import cli
from common.command.cli import UserError
from common.images import cifar
from common.images.cifar import BATCHES_FOLDER, CLASSES
from common.images.sources import open_source


@pytest.fixture
def archive(monkeypatch) -> bytes:
    """A tar.gz like CIFAR-10's, ten images a batch, with torchvision told the MD5s of its files."""
    rng = np.random.default_rng(0)
    md5s = {}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:

        def add(name: str, content: dict) -> None:
            data = pickle.dumps(content)
            md5s[name] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"{BATCHES_FOLDER}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        for name, _ in CIFAR10.train_list + CIFAR10.test_list:
            pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
            add(name, {"data": pixels, "labels": rng.permutation(10).tolist()})
        add("batches.meta", {"label_names": list(CLASSES)})
    for attribute in ("train_list", "test_list"):
        listed = [[name, md5s[name]] for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, listed)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5s["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    return packed.getvalue()


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[bytes, bool], list[bytes]]]:
    """Serve raw bytes as the answer to every request for CIFAR-10; returns the requests seen."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(
        CIFAR10, "url", f"http://127.0.0.1:{listener.getsockname()[1]}/{CIFAR10.filename}"
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ended = threading.Event()
    threads = []

    def start(answer: bytes, stall: bool = False) -> list[bytes]:
        requests = []

        def answer_all() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if ended.is_set():
                        return
                    requests.append(connection.recv(65536))
                    try:
                        connection.sendall(answer)
                    except OSError:  # the reader had enough
                        continue
                    if stall:
                        ended.wait(10)

        threads.append(threading.Thread(target=answer_all))
        threads[-1].start()
        return requests

    yield start
    ended.set()
    if threads:
        socket.create_connection(listener.getsockname()).close()
    for thread in threads:
        thread.join(10)
    listener.close()


def http(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body


def test_download_reads_as_torchvision_does(archive, serve, tmp_path, capsys):
    serve(http(archive))
    data_dir = tmp_path / "new" / "data"
    source = open_source(data_dir)
    assert capsys.readouterr().out == ""
    assert [p.name for p in data_dir.iterdir()] == [BATCHES_FOLDER]
    assert source.name == "cifar10"
    for split in ("train", "test"):
        reference = CIFAR10(data_dir, train=split == "train")
        opened = source.open_split(split)
        assert opened.labels.tolist() == reference.targets
        indices = np.array([9, 0, 3])
        expected = reference.data[indices].transpose(0, 3, 1, 2)
        assert np.array_equal(opened.read(indices), expected)


def test_what_is_there_is_not_downloaded_again(archive, serve, tmp_path):
    requests = serve(http(archive))
    open_source(tmp_path)
    count = len(requests)
    assert count > 0
    assert open_source(tmp_path).name == "cifar10"
    assert len(requests) == count


def test_quiet_downloads_say_nothing(archive, serve, tmp_path, capfd):
    cli.set_up_messages(quiet=True)
    serve(http(archive))
    open_source(tmp_path)
    assert capfd.readouterr() == ("", "")


FAULTS = {
    "cut off": lambda archive: http(archive[: len(archive) // 2], len(archive)),
    "other content": lambda archive: http(b"<html>Log in to the network</html>"),
    "no HTTP": lambda archive: b"SSH-2.0-OpenSSH_9.6\r\n",
    "not found": lambda archive: b"HTTP/1.0 404 Not Found\r\n\r\n",
    "bad chunks": lambda archive: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + archive[:100]
    ),
    "endless redirection": lambda archive: b"HTTP/1.0 302 Found\r\nLocation: /a\r\n\r\n",
    "nothing": lambda archive: b"",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_is_one_warning_and_leaves_nothing(
    fault, archive, serve, tmp_path, capsys
):
    cli.set_up_messages(quiet=True)
    serve(FAULTS[fault](archive))
    data_dir = tmp_path / "new" / "data"
    assert open_source(data_dir).name == "bundled"
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"warning: CIFAR-10 is not in {data_dir} and could not be downloaded (")
    assert line.endswith("): going on with the bundled JPEG images")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [b"", http(b"half", 1000)], ids=["silent", "half-way"])
def test_a_stalled_download_times_out(answer, archive, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
    before = socket.getdefaulttimeout()
    serve(answer, stall=True)
    with pytest.raises(UserError, match="timed out"):
        open_source(tmp_path, allow_bundled=False)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_an_interrupted_download_leaves_nothing(archive, tmp_path, monkeypatch):
    def interrupt(self: CIFAR10) -> None:
        (Path(self.root) / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(CIFAR10, "download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_may_download_at_once(archive, serve, tmp_path, monkeypatch):
    serve(http(archive))
    download = CIFAR10.download

    def overtaken(self: CIFAR10) -> None:
        download(self)
        if not (tmp_path / BATCHES_FOLDER).exists():  # the other run is done first
            (tmp_path / BATCHES_FOLDER).mkdir()
            for path in (Path(self.root) / BATCHES_FOLDER).iterdir():
                (tmp_path / BATCHES_FOLDER / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(CIFAR10, "download", overtaken)
    assert len(open_source(tmp_path).open_split("test").labels) == 10
