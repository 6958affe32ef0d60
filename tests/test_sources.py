"""Where images come from: torchvision's archive and its download, image folders, bundled ones.

What each bad folder is answered with stands in docs/bad_input.md (test_bad_input.py).
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from common import cli, sources
from common.cli import UserError
from common.sources import BATCHES_FOLDER, CLASSES, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


# --- torchvision's archive -----------------------------------------------------------------------


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
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
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


# --- image folders -------------------------------------------------------------------------------


def test_image_folders(image_folders, tmp_path):
    root = image_folders(tmp_path, per_class=2)
    source = open_source(root)
    split = source.open_split("test")
    assert source.name == "folder"
    assert split.labels.tolist() == sorted([*range(10), *range(10)])
    pixels = split.read(np.array([5, 0]))
    for index, path in enumerate(("bird/1.png", "airplane/0.png")):
        expected = np.asarray(Image.open(root / "test" / path)).transpose(2, 0, 1)
        assert np.array_equal(pixels[index], expected)


def test_classes_may_be_numbers(image_folders, tmp_path):
    split = open_source(image_folders(tmp_path, 1, tuple("0123456789"))).open_split("train")
    assert split.labels.tolist() == list(range(10))


def test_what_is_no_image_is_passed_over(image_folders, tmp_path):
    root = image_folders(tmp_path)
    (root / "test" / ".git").mkdir()
    (root / "test" / "README.txt").touch()
    cats = root / "test" / "cat"
    for name in (".DS_Store", "._0.png", "Thumbs.db", "labels.csv"):
        (cats / name).touch()
    (cats / "folder.png").mkdir()
    os.mkfifo(cats / "pipe.png")  # reading it would wait for ever
    split = open_source(root).open_split("test")
    assert split.labels.tolist() == list(range(10))
    assert split.read(np.arange(10)).shape == (10, 3, 32, 32)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


COLOURS = Image.fromarray(PIXELS)
PALETTE = COLOURS.convert("P")
IMAGE_IDS = (
    "png", "bmp", "webp", "jpeg", "grey", "one-bit", "alpha", "cmyk", "palette", "clear-palette",
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(COLOURS, "PNG"), PIXELS),
        (encoded(COLOURS, "BMP"), PIXELS),
        (encoded(COLOURS, "WEBP", lossless=True), PIXELS),
        (encoded(COLOURS, "JPEG"), None),
        (encoded(COLOURS.convert("L"), "PNG"), np.asarray(COLOURS.convert("L").convert("RGB"))),
        (encoded(COLOURS.convert("1"), "PNG"), np.asarray(COLOURS.convert("1").convert("RGB"))),
        (encoded(COLOURS.convert("RGBA"), "PNG"), PIXELS),
        (encoded(COLOURS.convert("CMYK"), "JPEG"), None),
        (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
        (encoded(PALETTE, "PNG", transparency=b"\0" * 9), np.asarray(PALETTE.convert("RGB"))),
    ],
    ids=IMAGE_IDS,
)
def test_images_become_rgb(content, expected, image_folders, tmp_path):
    root = image_folders(tmp_path)
    (root / "test" / "airplane" / "0.png").write_bytes(content)
    (pixels,) = open_source(root).open_split("test").read(np.array([0]))
    if expected is None:  # lossy: what Pillow makes of it
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))


@given(
    st.sampled_from([encoded(COLOURS, kind) for kind in ("PNG", "JPEG", "BMP", "WEBP")]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000),
)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(b"", [], 0)
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", [], 4000)
@example(encoded(COLOURS, "TIFF"), [], 4000)
def test_damaged_images_are_refused_or_read(content, changes, length):
    damaged = bytearray(content)
    for position, value in changes:
        if position < len(damaged):
            damaged[position] = value
    try:
        pixels = sources._decode_all([("image", lambda: bytes(damaged[:length]))])
    except UserError as error:
        message = str(error)
    else:
        message = "image: read"
        assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 32), np.uint8)
    assert message.startswith("image: ")


# --- bundled images ------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("test", 10_000), ("train", 2_000)])
def test_bundled_images(split, count, tmp_path):
    opened = open_source(tmp_path / "absent", bundled=True).open_split(split)
    assert np.bincount(opened.labels).tolist() == [count // 10] * 10
    pixels = opened.read(np.array([0, count - 1]))
    assert pixels.shape == (2, 3, 32, 32)
    assert not np.array_equal(pixels[0], pixels[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xfd7zXZ\0damaged", None], ids=["empty", "cut", "none"])
def test_damaged_bundled_images_are_an_error(content, tmp_path, monkeypatch):
    archive = tmp_path / "images.tar.xz"
    if content is not None:
        archive.write_bytes(content)
    monkeypatch.setitem(sources.BUNDLED_ARCHIVES, "test", archive)
    with pytest.raises(UserError, match=r"images\.tar\.xz: bundled images are missing or damaged"):
        open_source(tmp_path, bundled=True).open_split("test")
