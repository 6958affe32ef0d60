"""The table in docs/bad_input.md: each row is made here, run, and answered as the table says."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from processes import run_here
from torchvision.datasets import CIFAR10

from common.checkpoints import resnet
from common.checkpoints.checkpoint import BUNDLED_WEIGHTS, load_model
from common.checkpoints.resnet import ResNet, resnet18_shape
from common.command import cli
from common.files.output import OutputFolder
from common.files.unfinished import PartialResults
from common.images.cifar import BATCHES_FOLDER
from pipeline import pipeline
from pruning import pruning
from quantization import quantization
from training import training

State = dict[str, torch.Tensor]
TABLE = Path(__file__).resolve().parents[1] / "docs" / "bad_input.md"
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)


# --- checkpoints: each writes the file, given a full-size state dict -----------------------------


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_zip(path: Path, state: State) -> None:
    torch.save(state, path)
    cut_in_half(path)


def cut_legacy(path: Path, state: State) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    cut_in_half(path)


def cut_safetensors(path: Path, state: State) -> Path:
    from safetensors.torch import save_file

    path = path.with_suffix(".safetensors")
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    cut_in_half(path)
    return path


def flip_bit(path: Path, state: State) -> None:
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"layer3.0.conv1.weight")] ^= 1
    path.write_bytes(content)


class RunsCode:
    """Unpickles to a call of ``exec``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def hostile(path: Path, state: State) -> None:
    torch.save({"state_dict": state, "extra": RunsCode(path.parent / "code-has-run")}, path)


def torchscript(path: Path, state: State) -> None:
    class Identity(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.save(torch.jit.trace(Identity(), torch.ones(1)), path)


def zip_bomb(path: Path, state: State) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", bytes(1 << 20))
        archive.infolist()[0].file_size = 1 << 40  # into the directory, written on closing


def npz(path: Path, state: State) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))


def sized(path: Path, state: State) -> None:
    with path.open("wb") as file:
        file.truncate((1 << 32) + 1)  # a hole: takes no space


def saved(change: Callable[[State], object]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(change(state), path)


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Path, State], None]:
    return saved(lambda state: state | {name: value})


def quantized_stem() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(64, 3, 3, 3), 0.1, 0, torch.qint8)


def of_torchvision(name: str, **options: object) -> Callable[[Path, State], None]:
    def write(path: Path, state: State) -> None:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)(**options)
        zeros = {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items()}
        torch.save(zeros, path)

    return write


STEM = torch.zeros(64, 3, 3, 3)
CHECKPOINTS: dict[str, Callable[[Path, State], object]] = {
    "nothing at that path": lambda path, state: None,
    "an empty file": lambda path, state: path.touch(),
    "a folder": lambda path, state: path.mkdir(),
    "a named pipe": lambda path, state: os.mkfifo(path),
    "a file without read permission": lambda path, state: (path.write_bytes(b"?"), path.chmod(0)),
    "a file of more than 4 GiB": sized,
    "an HTML page saved as `.pth`": lambda path, state: path.write_text("\n<!doctype html>"),
    "a Git LFS pointer": lambda path, state: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 44776525\n"
    ),
    "a text file": lambda path, state: path.write_text("Not found"),
    "cut off half-way": cut_zip,
    "cut off half-way, torch's older format": cut_legacy,
    "cut off half-way, safetensors": cut_safetensors,
    "one bit flipped": flip_bit,
    "a pickle that runs code": hostile,
    "a whole model, from `torch.save(model)`": saved(lambda state: ResNet(resnet18_shape(10))),
    "a TorchScript archive": torchscript,
    "a NumPy `.npz`": npz,
    "a zip bomb": zip_bomb,
    "a list": saved(lambda state: list(state.values())),
    "an empty state dict": saved(lambda state: {}),
    "keys that are not names": saved(lambda state: dict(enumerate(state.values()))),
    "an entry that is no tensor": saved(lambda state: state | {"epoch": 3}),
    "an INT8 model": with_tensor("conv1.weight", quantized_stem()),
    "a sparse tensor": with_tensor("conv1.weight", STEM.to_sparse()),
    "a tensor on the meta device": with_tensor("conv1.weight", STEM.to("meta")),
    "one tensor under two names": with_tensor("_orig_mod.conv1.weight", STEM),
    "a prefix before some names only": with_tensor("module.conv1.weight", STEM),
    "integer weights": with_tensor("conv1.weight", STEM.int()),
    "NaN weights": with_tensor("conv1.weight", STEM + float("nan")),
    "infinite weights": with_tensor("conv1.weight", STEM + float("inf")),
    "FP64 weights beyond FP32's range": with_tensor("conv1.weight", STEM.double() + 1e300),
    "a negative variance": with_tensor("bn1.running_var", torch.full((64,), -1.0)),
    "finite weights that give infinite logits": with_tensor("conv1.weight", STEM + 1e38),
    "a missing tensor": saved(lambda s: {k: v for k, v in s.items() if k != "linear.bias"}),
    "an extra tensor": with_tensor("linear2.bias", torch.zeros(10)),
    "a wrong shape": with_tensor("bn1.weight", torch.zeros(32)),
    "a shape with more numbers than fit in memory": with_tensor(
        "conv1.weight", torch.zeros(()).expand(10**5, 10**5, 10**5)
    ),
    "another number of classes than the images have": of_torchvision("resnet18", num_classes=100),
    "weights of quantization-aware training": with_tensor(
        "conv1.weight_fake_quant.scale", torch.ones(1)
    ),
    "weights after dynamic quantization": saved(
        lambda state: state | {"linear._packed_params._packed_params": (STEM, None)}
    ),
    "averaged weights of torch-ema alone": saved(
        lambda state: {"decay": 0.9, "shadow_params": list(state.values())}
    ),
    "several state dicts, none with a usual name": saved(
        lambda state: {"a": state, "b": {**state}}
    ),
    "torchvision's `mobilenet_v2`, without `--model`": of_torchvision(
        "mobilenet_v2", num_classes=10
    ),
}


# --- networks: each writes a file with a function ------------------------------------------------

MODELS = {
    "`--model resnet18`": None,
    "`--model torchvision:resnet17`": None,
    "`--model FILE:net`, without that file": None,
    "`--model FILE:net`, without that function": "nets = 1",
    "`--model FILE:net`, which returns no network": "def net(): return 1",
    "`--model FILE:net`, which fails": "def net(): return 1 / 0",
    "`--model torchvision:vgg11_bn`, with weights of another network": None,
}


# --- data folders: each changes a folder with one image in each class ----------------------------


def bare(root: Path) -> None:
    for class_folder in (root / "test").iterdir():
        (class_folder / "0.png").unlink()
        class_folder.rmdir()


def remove_split(root: Path) -> None:
    (root / "test").rename(root / "testing")


def rename_splits(root: Path) -> None:
    (root / "test").rename(root / "Test")
    (root / "train").rename(root / "Train")


def not_unpacked(root: Path) -> None:
    root.rename(root.parent / "aside")
    root.mkdir()
    (root / "images.zip").touch()


def only_one_split(root: Path) -> None:
    root.rename(root.parent / "aside")
    (root.parent / "aside" / "test").rename(root)


def eleven_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "zebra").mkdir()
        SQUARE.save(root / split / "zebra" / "0.png")


def one_of_another_size(root: Path) -> None:
    """As the last of more images than those whose size is looked at."""
    for index in range(201):
        SQUARE.save(root / "test" / "cat" / f"{index}.png")
    SQUARE.resize((64, 64)).save(root / "test" / "cat" / "0.png")


def empty_class(root: Path) -> None:
    (root / "test" / "cat" / "0.png").rename(root / "test" / "cat" / "notes.txt")


def picture(image: Image.Image, name: str = "0.png", **options: object) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / "test" / "cat" / "0.png").unlink()
        image.save(root / "test" / "cat" / name, **options)

    return write


def raw_picture(content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "test" / "cat" / "0.png").write_bytes(content)


def cut_jpeg(root: Path) -> None:
    path = root / "test" / "cat" / "0.png"
    Image.open(path).save(path, "JPEG")
    cut_in_half(path)


def batches(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folder = root / BATCHES_FOLDER
        folder.mkdir()
        for name, _ in CIFAR10.train_list + CIFAR10.test_list:
            (folder / name).write_bytes(b"\x80\x04.")
        change(folder)

    return write


def empty_png(width: int, height: int) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (b"IHDR" + size, b"IDAT" + zlib.compress(b"")):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


SQUARE = Image.new("RGB", (32, 32))
DATA_FOLDERS: dict[str, Callable[[Path], object]] = {
    "`test/` without class folders": bare,
    "no `test/`, `val/`, `validation/` or `valid/`": remove_split,
    "splits of other names (`Test/`, `Train/`)": rename_splits,
    "an archive that is not unpacked": not_unpacked,
    "class folders, but no `train/` and `test/`": only_one_split,
    "an empty folder, without internet": lambda root: (
        root.rename(root.parent / "aside"),
        root.mkdir(),
    ),
    "a class without images": empty_class,
    "a class missing in one split": lambda root: (root / "test" / "cat").rename(
        root / "test" / ".cat"
    ),
    "an eleventh class in one split": lambda root: (root / "test" / "zebra").mkdir(),
    "eleven classes, and a network of ten": eleven_classes,
    "a class folder without permission": lambda root: (root / "test" / "cat").chmod(0),
    "a file that is no image": raw_picture(b"GIF? no."),
    "an empty image file": raw_picture(b""),
    "a JPEG cut off half-way": cut_jpeg,
    "another format (GIF, TIFF, EPS) named `.png`": picture(SQUARE, format="GIF"),
    "a 16-bit PNG": picture(Image.fromarray(np.zeros((32, 32), dtype=np.uint16))),
    "a 64×64 image among many of 32×32": one_of_another_size,
    "a PNG of 60000×60000 pixels": raw_picture(empty_png(60_000, 60_000)),
    "fewer images than `--test-images` asks for": lambda root: None,
    "`cifar-10-batches-py/` with a wrong checksum": batches(lambda folder: None),
    "`cifar-10-batches-py/` with a file missing": batches(
        lambda folder: (folder / "test_batch").unlink()
    ),
    "`cifar-10-batches-py/` with a file half downloaded": batches(
        lambda folder: cut_in_half(folder / "test_batch")
    ),
    "`--data-dir` is a file": lambda root: (root.rename(root.parent / "aside"), root.touch()),
    "the folder does not exist": lambda root: root.rename(root.parent / "aside"),
    "`train/` and `test/` are one folder deeper": lambda root: (
        root.rename(root.parent / "aside"),
        root.mkdir(),
        (root.parent / "aside").rename(root / "photos"),
    ),
}
OUTPUT_FOLDERS: dict[str, Callable[[Path], object]] = {
    "`--output-dir` is a file": lambda path: path.touch(),
    "`--output-dir` lies below a file": lambda path: path.parent.touch(),
    "`--output-dir` may not be written": lambda path: path.mkdir(mode=0o555, parents=True),
    "another run is using `--output-dir`": lambda path: path.mkdir(parents=True),
}
IDENTITY = "unfinished/identity.json"
UNFINISHED = {
    "files that no run left": {"unfinished/thesis.tex": b"mine"},
    "those of a run, without `--resume` and `--overwrite`": {IDENTITY: b"0a1b2c3d {}"},
    "those of another script, with `--resume`": {IDENTITY: b'1c8c6cd0 {"the script": "other"}'},
    "those of a run with other settings, with `--resume`": {},
    "damaged ones, with `--resume`": {IDENTITY: b"0a1b2c3d {}"},
}
DEVICES = {
    "`--device cuda`, without an NVIDIA GPU that torch can use": "cuda",
    "`--device mps`, without an Apple GPU": "mps",
}
SCRIPTS = {
    f"{script.__name__.rpartition('.')[2]}.py": script
    for script in (pruning, quantization, pipeline, training)
}
FLAGS = {
    row: shlex.split(row.strip("`"))
    for row, _ in ROWS
    if row.startswith(("`--", *(f"`{name} --" for name in SCRIPTS)))
    and row not in DATA_FOLDERS
    and row not in MODELS
    and row not in OUTPUT_FOLDERS
    and row not in DEVICES
}


def expected_line(row: str, **paths: Path) -> re.Pattern[str]:
    """Return the row's message as a pattern: FILE and DIR are paths, … is anything."""
    pattern = re.escape(dict(ROWS)[row]).replace("…", ".*")
    for placeholder, path in paths.items():
        pattern = re.sub(rf"\b{placeholder}\b", lambda _, path=path: re.escape(str(path)), pattern)
    return re.compile(pattern)


def tree(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if "code-has-run" not in path.name}


def check(script: ModuleType, argv: list[object], line: re.Pattern[str], root: Path) -> None:
    """Run, and expect one line, exit code 1, and a file system as it was."""
    before = tree(root)
    done = run_here(script.main, *argv, "--quiet", "--threads", 1)
    assert line.fullmatch(done.stderr.removeprefix("error: ").removesuffix("\n")), done.stderr
    assert done.stderr.startswith("error: ")
    assert (done.returncode, done.stdout) == (cli.EXIT_FAILED, "")
    assert tree(root) == before


def by_turns(rows: Iterable[str]) -> pytest.MarkDecorator:
    """Give each row to one of the scripts that compress: they read all that is theirs alike."""
    scripts = itertools.cycle([pruning, quantization, pipeline])
    return pytest.mark.parametrize(("row", "script"), [*zip(rows, scripts, strict=False)])


def test_every_row_is_tested():
    assert len(dict(ROWS)) == len(ROWS)
    tables = (CHECKPOINTS, MODELS, DATA_FOLDERS, OUTPUT_FOLDERS, UNFINISHED, DEVICES, FLAGS)
    assert set().union(*tables) == dict(ROWS).keys()


@by_turns(CHECKPOINTS)
def test_checkpoint(row, script, folder, blank_state, without_privileges):
    path = CHECKPOINTS[row](folder / "weights.pth", blank_state)
    path = path if isinstance(path, Path) else folder / "weights.pth"
    argv = ["--bundled", "--output-dir", folder / "results", "--weights", path]
    with without_privileges() if "permission" in row else contextlib.nullcontext():
        check(script, argv, expected_line(row, FILE=path), folder)
    assert not (folder / "code-has-run").exists()


def test_the_hostile_pickle_would_run(folder, blank_state):
    """The case above is worth something only where an unsafe reader does run the code."""
    hostile(folder / "weights.pth", blank_state)
    torch.load(folder / "weights.pth", weights_only=False)
    assert (folder / "code-has-run").exists()


@by_turns(MODELS)
def test_model(row, script, folder):
    path = folder / "mine.py"
    if MODELS[row] is not None:
        path.write_text(MODELS[row])
    name = row.split("`")[1].removeprefix("--model ").replace("FILE", str(path))
    argv = ["--bundled", "--output-dir", folder / "results", "--model", name]
    file = BUNDLED_WEIGHTS if "weights of" in row else path
    check(script, [*argv, "--weights", BUNDLED_WEIGHTS], expected_line(row, FILE=file), folder)


@by_turns(DATA_FOLDERS)
def test_data_folder(row, script, folder, image_folders, without_privileges, monkeypatch):
    root = image_folders(folder / "data")
    DATA_FOLDERS[row](root)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    count = 100 if "fewer" in row else 10
    argv = ["--data-dir", root, "--no-bundled", "--weights", BUNDLED_WEIGHTS]
    argv += ["--test-images", count, "--output-dir", folder / "results"]
    if "64×64" in row:
        argv[argv.index("--test-images") + 1] = "all"
    image = next((root / "test" / "cat").glob("0.*"), root) if "permission" not in row else root
    image = BUNDLED_WEIGHTS if "network of" in row else image
    with without_privileges() if "permission" in row else contextlib.nullcontext():
        check(script, argv, expected_line(row, FILE=image, DIR=root), folder)


@by_turns(OUTPUT_FOLDERS)
def test_output_folder(row, script, folder, without_privileges):
    path = folder / "outer" / "results" if "below" in row else folder / "results"
    OUTPUT_FOLDERS[row](path)
    argv = ["--bundled", "--test-images", 1, "--output-dir", path]
    if "another" in row:
        with OutputFolder(path):
            check(script, argv, expected_line(row, DIR=path), folder)
    else:
        with without_privileges():
            check(script, argv, expected_line(row, DIR=path), folder)


def keep_a_piece_and_stop(folder: OutputFolder, identity: dict, resume: bool) -> None:
    PartialResults(folder.path / "unfinished", identity, resume)["piece"] = {}
    raise cli.UserError("stopped")


@pytest.mark.parametrize("row", UNFINISHED)
@pytest.mark.parametrize("script", [pruning, pipeline, training])
def test_unfinished(row, script, folder, tiny_weights, monkeypatch):
    if UNFINISHED[row]:
        (folder / "unfinished").mkdir()
        (folder / "unfinished" / "piece.json").touch()
    for name, content in UNFINISHED[row].items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(resnet, "ResNet", lambda shape: load_model(tiny_weights))  # training's
    argv = ["--bundled", "--test-images", 120, "--output-dir", folder]
    argv += ["--train-images", 30, "--batch-size", 10] if script is training else []
    argv += ["--held-out-images", 10] if script is training else ["--weights", tiny_weights]
    argv += ["--calibration-images", 10, "--max-drop", 0.49] if script is pipeline else []
    if "other settings" in row:
        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "keep_unfinished", keep_a_piece_and_stop)
            assert run_here(script.main, *argv, "--seed", 1).returncode == cli.EXIT_FAILED
    argv += ["--resume"] if "with `--resume`" in row else []
    check(script, argv, expected_line(row, DIR=folder), folder)


@by_turns(DEVICES)
def test_device(row, script, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    argv = ["--bundled", "--device", DEVICES[row], "--output-dir", folder / "results"]
    check(script, argv, expected_line(row), folder)


@pytest.mark.parametrize("row", FLAGS)
def test_flag(row):
    """A row without a script's name is of the flags that the scripts share."""
    first, *rest = FLAGS[row]
    scripts = [SCRIPTS[first]] if first in SCRIPTS else [pruning, quantization, pipeline]
    for script in scripts:
        done = run_here(script.main, *(rest if first in SCRIPTS else [first, *rest]))
        usage, _, line = done.stderr.rpartition(": error: ")
        assert usage.startswith("usage: ")
        assert expected_line(row).fullmatch(line.removesuffix("\n")), line
        assert (done.returncode, done.stdout) == (cli.EXIT_USAGE, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_takes_a_value_has_a_row(script):
    tested = {word for row in FLAGS.values() if row[0] == script for word in row}
    tested |= {word for row in FLAGS.values() if row[0].startswith("--") for word in row}
    actions = SCRIPTS[script].build_parser()._actions
    with_value = {action.option_strings[0] for action in actions if action.nargs is None}
    assert with_value - tested == set()
