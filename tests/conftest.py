"""Fixtures that several test files share: tiny models, random images, image folders."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import image_set, normalize
from hypothesis import settings
from PIL import Image
from processes import undisturbed
from resnet18 import ResNet18, Widths, weight_modules
from torch.nn.utils import prune

from common.checkpoints.checkpoint import save_checkpoint
from common.images import cifar
from common.images.cifar import CLASSES
from common.images.data import ImageSet
from common.network.execution import Network
from common.network.tracing import trace_network
from quantization.int8 import conversion, engines
from quantization.int8.conversion import Observation
from quantization.int8.network import Int8Network
from quantization.settings import Settings

TINY = Widths((4, 8, 8, 8), (4, 3, 5, 8, 8, 6, 8, 7))  # of no two kinds of layers alike
NOBODY = 65534

# Whole runs, the longest first: so that no process is left with one of them at the end.
LONGEST = (
    "test_headline.py", "test_pins.py", "test_published.py",  # these under `make test-all` alone
    "test_pruning.py", "test_pipeline.py", "test_quantization.py", "test_interruptions.py",
    "test_pruning_together.py", "test_training.py",
)  # fmt: skip

# How long an example takes says what else the machine does.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")

# Tiny networks gain nothing from threads, and lose a lot where other work shares the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; xdist hands files out in this order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if any(map(engines.saturates, engines.candidate_engines())):
        for item in items:
            if item.get_closest_marker("exact_sums"):
                item.add_marker(pytest.mark.skip(reason="this CPU's sums of products saturate"))


@pytest.fixture(autouse=True, scope="module")
def _imports_frozen() -> None:
    """Spare the garbage collector what is imported: quantizing calls it at every step."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _archives_opened_once() -> Iterator[None]:
    """Unpack the bundled images once in each process, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "open_archive", functools.cache(cifar.open_archive))
        yield


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """Leave the process to the next test as importing left it."""
    with undisturbed():
        yield


@pytest.fixture(scope="session")
def random_images() -> Callable[..., ImageSet]:
    """Make a dataset of random pixels, its classes in turns."""

    def make(count: int, seed: int = 0) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        # A colour for each image and noise over it, so that a network tells them apart.
        colours = torch.randint(0, 192, (count, 3, 1, 1), dtype=torch.uint8, generator=generator)
        noise = torch.randint(0, 64, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        images = colours + noise
        return image_set(images, torch.arange(count) % 10)

    return make


@pytest.fixture(scope="session")
def make_network(random_images) -> Callable[[Widths], ResNet18]:
    """Make a network whose batch-norms fit its activations, so that its classes vary."""

    def make(widths: Widths) -> ResNet18:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ResNet18(widths)
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            with torch.no_grad():
                model(normalize(random_images(32).images))
        return model.eval()

    return make


@pytest.fixture
def tiny_model(make_network) -> ResNet18:
    """A narrow network."""
    return make_network(TINY)


@pytest.fixture(scope="session")
def tiny_weights(make_network, tmp_path_factory) -> Path:
    """The narrow network's checkpoint, for runs that are not about the bundled weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_checkpoint(make_network(TINY).state_dict(), path)
    return path


@pytest.fixture
def pruned_model(tiny_model) -> ResNet18:
    """The tiny network without 80 % of its weights, pruned by torch."""
    layers = [(layer, "weight") for layer in weight_modules(tiny_model).values()]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.8)
    for layer, name in layers:
        prune.remove(layer, name)
    return tiny_model


@pytest.fixture
def tiny_network(tiny_model) -> Network:
    """The narrow network as a graph."""
    return trace_network(tiny_model, (3, 32, 32))


@pytest.fixture
def observe(tiny_network, random_images) -> Callable[[Settings], Observation]:
    """Observe the narrow network's values as settings say."""
    return lambda settings: conversion.observe(
        tiny_network, random_images(32), settings.observer, 16
    )


@pytest.fixture
def convert(observe) -> Callable[[Settings], Int8Network]:
    """Make the narrow network's INT8 network as settings say."""
    return lambda settings: conversion.convert(observe(settings), settings)


@pytest.fixture
def tiny_state(tiny_model) -> dict[str, torch.Tensor]:
    """The tiny network's weights."""
    return tiny_model.state_dict()


@pytest.fixture
def blank_state() -> dict[str, torch.Tensor]:
    """A full-size state dict of zeros; each tensor repeats one number, so its file is small."""
    return {
        name: value.new_zeros(()).expand(value.shape)
        for name, value in ResNet18().state_dict().items()
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that any user may write to (pytest's own is closed to others)."""
    path = Path(tempfile.mkdtemp(prefix="test-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context in which files of more than 5,000 bytes fail, as on a disk that fills up."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return context


@pytest.fixture
def without_privileges() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context in which permissions bind, even where the tests run as root."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        user = os.geteuid()
        if user == 0:
            try:
                os.seteuid(NOBODY)
            except OSError:
                pytest.skip("a container whose root cannot become another user")
        try:
            yield
        finally:
            os.seteuid(user)

    return context


@pytest.fixture
def image_folders() -> Callable[..., Path]:
    """Write image folders of random PNGs, ``per_class`` in each class of both splits."""

    def write(root: Path, per_class: int = 1, classes: tuple[str, ...] = CLASSES) -> Path:
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for name in classes:
                (root / split / name).mkdir(parents=True)
                for index in range(per_class):
                    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{index}.png")
        return root

    return write
