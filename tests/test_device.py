"""Where work runs: devices that are there, and those that are not."""

from __future__ import annotations

import pytest
import torch

from common import device
from common.cli import UserError
from common.data import normalize
from common.evaluate import predict

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
