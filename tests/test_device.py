"""Where work runs: devices that are there, and those that are not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from cifar import image_set, normalize
from resnet18 import ResNet18, Widths
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.command.cli import UserError
from common.images import data
from common.images.data import ImageSet
from common.machine import device
from common.measure.evaluate import predict
from common.network.cascade import Cascade, Fp32Recheck, Variants
from common.network.tracing import trace_network
from pruning.together.search import make_classifier
from training.loop.augment import make_batch, plan_epoch
from training.recipe import Recipe

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def offer(monkeypatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(name, monkeypatch):
    offer(monkeypatch, cuda=name != "cuda", mps=name != "mps")
    with pytest.raises(UserError, match=f"--device {name}: torch finds no such device here"):
        device.choose_device(name)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_a_gpu_where_there_is_one(cuda, mps, expected, monkeypatch):
    offer(monkeypatch, cuda, mps)
    assert device.choose_device("auto").type == expected
    assert device.choose_device("cpu").type == "cpu"


def test_tf32_is_off_on_a_gpu(monkeypatch):
    offer(monkeypatch, cuda=True, mps=False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    device.choose_device("cuda")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_where_there_is_no_glibc_memory_is_freed_as_ever(error, monkeypatch):
    def missing(name: None) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", missing)
    device.set_up_cpu(None)


def test_glibc_is_told_to_keep_freed_memory(monkeypatch):
    """Of malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1; without limit is -1."""
    libc = mock.Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    device.set_up_cpu(None)
    assert libc.mallopt.mock_calls == [mock.call(-4, 0), mock.call(-1, -1)]


# --- a GPU that is not there: shapes, devices and dtypes without numbers --------------------------


class Devices(TorchDispatchMode):
    """Counts the tensors that go from one device to another; FP64 may be on the CPU alone.

    Apple's GPUs have no FP64.
    """

    crossings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "cpu" or x.dtype != torch.float64 for x in made), function
        self.crossings += len({x.device.type for x in given + made}) > 1
        return found


@pytest.fixture
def imagined() -> Iterator[tuple[ResNet18, ImageSet]]:
    """A network and 64 images on a GPU that fails where a number is asked for, as waiting does."""
    data._on_device.cache_clear()
    with FakeTensorMode():
        with torch.device("cuda"):
            model = ResNet18(Widths((4, 8, 8, 8))).eval()
            images = torch.empty(64, 3, 32, 32, dtype=torch.uint8)
            labels = torch.empty(64, dtype=torch.int64)
        normalize(images)  # whose constants go to the GPU once
        with torch.inference_mode():
            yield model, image_set(images, labels)
    data._on_device.cache_clear()


def test_the_scan_neither_waits_nor_leaves_the_gpu(imagined):
    model, images = imagined
    network = trace_network(model, images.shape)
    layers = ["conv1", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0", "linear"]
    variants = Variants({name: network.layers[name] for name in layers}, None)
    cascade, (features,) = Cascade.of(network, fast=False), network.graph["linear"].inputs
    assert network.shapes  # learned once
    with Devices() as devices:
        batches = [*cascade.walk(features, [variants], images, 16, Fp32Recheck())]
    assert [correct.shape for _, _, correct in batches] == [(5, 16)] * 4
    assert all(value.is_cuda for batch in batches for value in batch)
    assert devices.crossings == 0


def test_classifying_leaves_the_gpu_once_at_the_end(imagined):
    model, images = imagined
    network = trace_network(model, images.shape)
    with Devices() as devices:
        correct = make_classifier(network, images, False, Fp32Recheck())(images)
    assert not correct.is_cuda
    assert devices.crossings == 1


def test_batches_to_train_on_are_made_on_the_gpu(imagined):
    _, images = imagined
    recipe = Recipe(epochs=1, batch_size=16, learning_rate=0.1, cutmix=0.5, jitter=0.5)
    plan = plan_epoch(64, 32, recipe, 0, 0, images.images.device)
    pixels = images.images.permute(0, 2, 3, 1)
    with Devices() as devices:
        batch, _ = make_batch(images, pixels, plan, slice(16))
    assert batch.is_cuda
    assert devices.crossings == 0


# --- where there is a GPU ------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_predicts_what_the_cpu_does(tiny_model, random_images):
    images = random_images(200)
    expected = tiny_model(normalize(images.images)).argmax(dim=1)
    place = device.choose_device("cuda")
    found = predict(tiny_model.to(place), images.to(place), 64)
    assert int((found != expected).sum()) <= 1


@pytest.mark.gpu
@needs_gpu
def test_nothing_in_the_loop_waits_for_the_gpu(tiny_model, random_images):
    place = device.choose_device("cuda")
    model, images = tiny_model.to(place), random_images(64).to(place)
    predict(model, images, 16)  # warmed up
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for start in range(0, 64, 16):
                model(normalize(images.images[start : start + 16])).argmax(dim=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_is_taken_only_where_a_convolution_is_faster_in_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    milliseconds = {torch.float32: 2, torch.bfloat16: 1}
    clock = [0.0]

    def convolution(dtype: torch.dtype):
        def run(maps: torch.Tensor) -> None:
            clock[0] += milliseconds[dtype] / 1000

        return run, None

    monkeypatch.setattr(device, "_example_convolution", convolution)
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    assert device.bf16_pays.__wrapped__()
    milliseconds[torch.bfloat16] = 3
    assert not device.bf16_pays.__wrapped__()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    milliseconds[torch.bfloat16] = 1
    assert not device.bf16_pays.__wrapped__()


def test_peak_memory_where_the_system_tells_less(monkeypatch):
    told = device.peak_memory_bytes()
    monkeypatch.setattr(device.Path, "read_text", lambda path: "Name:\tpython\nVmSize:\t9 kB\n")
    assert 0.2 < device.peak_memory_bytes() / told < 5  # by another call, of all threads' pages
