"""The program that runs INT8 files without torch: its integers, its answers, what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import venv
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from every_kind import make_every_kind, make_images
from PIL import Image
from processes import REPOSITORY
from test_int8_file import FORGERIES, as_bytes, rewrite

from common.checkpoints.checkpoint import find_weights, load_network
from common.images.cifar import bundled_source
from common.images.decoding import Sizing, decode_images
from common.images.loading import load_images
from common.network.tracing import trace_network
from quantization import load_int8
from quantization.files.artifact import write_checks
from quantization.files.int8_file import save_int8
from quantization.int8 import engines
from quantization.int8.conversion import convert, observe
from quantization.settings import Settings
from runtime import classify, decode

PACKAGES = ("numpy", "safetensors", "constriction", "onnx", "onnxruntime", "pillow")
BLOCKING = (
    "import runpy, sys\n"
    "for name in ('torch', 'torchvision', 'common', 'quantization'): sys.modules[name] = None\n"
    "sys.path.insert(0, '.')\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def network():
    images = replace(make_images(32), channel_order="bgr", resize=14)
    observed = observe(trace_network(make_every_kind(), (3, 12, 12)), images, "minmax", 16)
    return convert(observed, Settings(fp32_layers=("hidden",)))


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_int8(network, path)
    return path


@pytest.fixture(scope="module")
def copied(saved):
    """A folder with the model and the two programs, and nothing else of the project."""
    for name in ("decode.py", "classify.py"):
        shutil.copy(REPOSITORY / "runtime" / name, saved.parent)
    return saved.parent


def run(folder, *arguments, python=sys.executable):
    return subprocess.run(
        [python, "-c", BLOCKING, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def assert_refused(process, reason):
    assert process.returncode == 1
    assert re.fullmatch(rf"error: .*{reason}.*\n", process.stderr), process.stderr


def test_the_integers_are_those_of_the_network(network, saved):
    found = decode.parse(saved.read_bytes())
    assert found.operations == network.graph.to_json()
    assert found.ranges == {n: (r.scale, r.zero_point) for n, r in network.ranges.items()}
    for name, layer in network.layers.items():
        weights = found.weights[name]
        assert np.array_equal(weights.levels, layer.weight.numpy())
        assert np.array_equal(weights.bias, layer.bias.numpy())
        assert (weights.scales is None) == (not layer.is_int8)
        assert weights.scales is None or np.array_equal(weights.scales, layer.scales.numpy())
    in_fp32 = {name for name, layer in network.layers.items() if not layer.is_int8}
    assert len(in_fp32) > len({"hidden"} & in_fp32) == 1  # an affine operation, too


@pytest.mark.exact_sums
def test_pixels_get_the_answers_of_the_reference(network, saved):
    pixels = make_images(64, seed=1).images
    run = engines.runner("reference", network)
    expected = run(load_int8(saved).normalize(pixels)).numpy()
    got = decode.load(saved)(pixels.numpy())
    assert np.square(got - expected).mean() < 1e-3 * expected.var()
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.98


def test_a_network_that_takes_blue_first_gets_it_first(network, saved):
    model = load_int8(saved)
    assert (model.network.channel_order, model.network.resize) == ("bgr", 14)
    pixels = make_images(4).images
    rgb = (pixels.float() / 255 - torch.tensor(network.mean).view(3, 1, 1)) / torch.tensor(
        network.std
    ).view(3, 1, 1)
    assert torch.allclose(model.normalize(pixels), rgb.flip(1), atol=1e-6)


def test_other_images_are_refused_in_one_line(saved):
    run = decode.load(saved)
    for pixels in (np.zeros((1, 3, 12, 12), np.float32), np.zeros((3, 12, 12), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 images of shape \(N, 3, 12, 12\)"):
            run(pixels)


@pytest.mark.parametrize("takes", ["images", "pixels"])
def test_a_copy_writes_a_model_without_torch(takes, copied, saved):
    process = run(copied, "decode.py", saved.name, f"{takes}.onnx", "--input", takes)
    assert process.returncode == 0, process.stderr
    model = onnx.load(copied / f"{takes}.onnx")
    (value,) = model.graph.input
    assert value.name == takes
    facts = {item.key for item in model.metadata_props}
    assert facts >= {"input", "classes", "mean", "std", "channel_order", "resize"}
    pixels = make_images(8).images
    images = pixels if takes == "pixels" else load_int8(saved).normalize(pixels).contiguous()
    session = decode.start_session(str(copied / f"{takes}.onnx"))
    (logits,) = session.run(None, {takes: images.numpy()})
    assert np.allclose(logits, decode.load(saved)(pixels.numpy()), atol=1e-4)


def test_a_copy_classifies_a_photo_without_torch(copied, saved):
    photo = Image.fromarray(make_images(1).images[0].permute(1, 2, 0).numpy()).resize((40, 30))
    photo.save(copied / "photo.png")
    process = run(copied, "classify.py", saved.name, "photo.png")
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines()]
    assert sorted(name for _, name in rows) == ["cat", "cow", "dog", "fox", "owl"]
    shares = [float(share.rstrip("%")) for share, _ in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1)
    pixels = classify.read_image(copied / "photo.png", 12, 12, 14)
    logits = load_int8(saved)(load_int8(saved).normalize(torch.from_numpy(pixels[None].copy())))
    expected = 100 * logits.softmax(1)[0].max()
    assert shares[0] == pytest.approx(float(expected), abs=2)


def test_bad_photos_are_told_in_one_line(copied, saved):
    (copied / "text.jpg").write_text("no image")
    assert_refused(run(copied, "classify.py", saved.name, "text.jpg"), "text.jpg: no JPEG")
    assert_refused(run(copied, "classify.py", saved.name, "none.jpg"), "none.jpg: cannot be read")
    (copied / "text.safetensors").write_text("no network")
    process = run(copied, "classify.py", "text.safetensors", "none.jpg")
    assert_refused(process, "text.safetensors: damaged or no")


@pytest.mark.parametrize("model", ["photo.jpg", "model.onnx", "."])
def test_another_file_in_place_of_the_model_gets_the_usage(copied, saved, model):
    process = run(copied, "classify.py", model, saved.name)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: classify.py")
    assert f"{model}: not a .safetensors file; the model comes first" in process.stderr


def test_photos_behind_a_bad_one_are_classified(copied, saved):
    process = run(copied, "classify.py", saved.name, "none.jpg", "photo.png")
    assert process.returncode == 1
    assert process.stderr.startswith("error: none.jpg: cannot be read")
    assert process.stdout.startswith("photo.png:\n")
    assert len(process.stdout.splitlines()) == 6


def test_a_missing_decoder_and_a_closed_pipe_are_no_tracebacks(copied, saved, tmp_path):
    (tmp_path / "classify.py").write_bytes((copied / "classify.py").read_bytes())
    assert_refused(run(tmp_path, "classify.py", "x.safetensors", "y"), "No module named 'decode'")
    argv = [sys.executable, "classify.py", saved.name, *["photo.png"] * 2]
    process = subprocess.Popen(
        argv, cwd=copied, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, "")
    process.stderr.close()


@pytest.mark.parametrize("size", [(12, 12), (45, 100), (99, 70), (13, 500), (7, 7)])
@pytest.mark.parametrize("wanted", [(12, 12), (33, 50)])
def test_photos_of_any_size_fill_the_image(size, wanted):
    photo = Image.new("RGB", size, "white")
    pixels = np.asarray(classify.fit(photo, *wanted, None))
    assert pixels.shape == (*wanted, 3)
    assert pixels.min() == 255


def test_photos_are_read_as_the_test_images_were(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8)).save(path)
    (expected,) = decode_images([(path.name, path.read_bytes)], 1, Sizing(12, 12, 14))
    assert np.array_equal(classify.read_image(path, 12, 12, 14), expected)


def test_a_check_passes_for_its_own_network_alone(network, saved, copied, tmp_path):
    write_checks([saved], make_images(32, seed=2), tmp_path.joinpath, "reference")
    (path,) = tmp_path.iterdir()
    images, same, difference = decode.check(decode.load(saved), path)
    assert (images, same) == (16, 16)
    assert difference < decode.MAX_DIFFERENCE
    process = run(copied, "decode.py", saved.name, "--check", path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("passed: 16 of 16 images get the expected class; ")
    spoilt = replace(network.layers["classify"], bias=network.layers["classify"].bias + 1)
    other = replace(network, layers={**network.layers, "classify": spoilt})
    save_int8(other, tmp_path / "other.safetensors")
    process = run(copied, "decode.py", tmp_path / "other.safetensors", "--check", path)
    assert process.returncode == 1
    assert process.stdout.endswith(": another network, or images prepared in another way\n")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(run(copied, "decode.py", saved.name, "--check", path), "checksum differs")


def test_forged_files_are_refused_in_one_line(saved, tmp_path):
    path = tmp_path / "forged.safetensors"
    for number, (change, _) in enumerate(FORGERIES):
        path.write_bytes(saved.read_bytes())
        rewrite(path, change)
        with pytest.raises(decode.FileError, match="damaged or no INT8") as refused:
            decode.load(path)
        assert "\n" not in str(refused.value), number


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"PK\x03\x04", b"\xff" * 100])
def test_other_files_are_refused_in_one_line(content, copied, tmp_path):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(decode.FileError, match=r"bad\.safetensors: [^\n]+$"):
        decode.load(path)
    if content is None:
        assert_refused(run(copied, "decode.py", path, "x.onnx"), "no such file")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, j, m: t.update(network=as_bytes(zlib.compress(b"[" * (1 << 28)))),
        lambda t, j, m: j["weights"][0].__setitem__(1, [1 << 12, 1 << 12, 64, 64]),
        lambda t, j, m: j["weights"][0].__setitem__(1, [8, 3, 1 << 10, 1 << 10]),
        lambda t, j, m: t.update(scale_runs=t["scale_runs"] * 0 + (1 << 30)),
    ],
)
def test_memory_is_bounded(change, saved, tmp_path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(saved.read_bytes())
    rewrite(path, change)
    tracemalloc.start()
    with pytest.raises(decode.FileError):
        decode.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_model_that_cannot_be_written_is_told(copied, saved):
    assert_refused(run(copied, "decode.py", saved.name, "none/x.onnx"), "none/x.onnx: No such file")


def test_wrong_usage_is_told(copied, saved):
    process = run(copied, "decode.py", saved.name)
    assert process.returncode == 2
    assert "--check" in process.stderr


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The Python of a new environment that has the packages that the runtime names, and no more."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode and os.environ.get("PYPI") != "required":
        pytest.skip(f"pip cannot install {', '.join(PACKAGES)} here")
    assert process.returncode == 0, process.stderr
    return python


@pytest.mark.full
@pytest.mark.exact_sums
def test_an_environment_without_torch_gives_the_same_classes(bare_python, copied, tmp_path):
    model = load_network(find_weights(None, tmp_path)).model
    source = bundled_source()
    calibration = load_images(source, "train", 128, 0)
    test = load_images(source, "test", 400, 0)
    network = convert(
        observe(trace_network(model, test.shape), calibration, "minmax", 64), Settings()
    )
    save_int8(network, copied / "resnet18.safetensors")
    np.save(copied / "pixels.npy", test.images.numpy())
    program = (
        "import numpy, sys\n"
        "from decode import load\n"
        "classify = load('resnet18.safetensors', threads=1)\n"
        "numpy.save('logits.npy', classify(numpy.load('pixels.npy')))\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = subprocess.run(
        [bare_python, "-c", program], cwd=copied, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    ours = load_int8(copied / "resnet18.safetensors")
    with torch.inference_mode():
        expected = ours(ours.normalize(test.images)).argmax(1).numpy()
    same = np.load(copied / "logits.npy").argmax(1) == expected
    assert same.mean() >= 0.995
    Image.fromarray(test.images[0].permute(1, 2, 0).numpy()).save(copied / "first.png")
    process = subprocess.run(
        [bare_python, "classify.py", "resnet18.safetensors", "first.png"],
        cwd=copied, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 5
    assert process.stdout.split()[1] == test.classes[expected[0]]
