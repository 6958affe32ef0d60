"""load_int8: a model from a file alone, that leaves no trace in the caller's process."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from every_kind import make_every_kind, make_images
from processes import run_fresh

import quantization
from common.command import cli
from common.command.cli import UserError
from common.network.tracing import trace_network
from quantization.files import artifact
from quantization.files.artifact import load_int8
from quantization.files.int8_file import save_int8
from quantization.int8 import engines
from quantization.int8.conversion import convert, observe
from quantization.int8.engines.reference import ReferenceRunner
from quantization.settings import Settings

ENGINES = engines.candidate_engines()


@pytest.fixture(scope="module")
def observation():
    return observe(trace_network(make_every_kind(), (3, 12, 12)), make_images(32), "minmax", 16)


@pytest.fixture(scope="module")
def saved(observation, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_int8(convert(observation, Settings()), path)
    return path


@pytest.fixture(scope="module")
def images():
    images = make_images(6, seed=1)
    return images.normalize(images.images)


@pytest.mark.exact_sums
@pytest.mark.parametrize("engine", [*ENGINES, None])
def test_a_loaded_model_answers_like_the_reference(saved, observation, images, engine):
    model = load_int8(saved, engine)
    found, expected = model(images), ReferenceRunner(convert(observation, Settings()))(images)
    # Sums close to a half are rounded either way, which this network's small layers make much of.
    assert (found - expected).square().mean() < 0.002 * expected.var()


def test_a_model_knows_its_classes_and_how_images_are_normalised(saved):
    model, images = load_int8(saved), make_images(3)
    assert model.classes == images.classes
    assert torch.equal(model.normalize(images.images), images.normalize(images.images))


def test_nothing_of_the_callers_process_changes(saved, images):
    before = (
        torch.random.get_rng_state(),
        torch.backends.quantized.engine,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    model = load_int8(saved)
    logits = model(images)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert before[1:] == (
        torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled(),
    )  # fmt: skip
    assert not logits.is_inference()


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_the_callers_default_type_and_device_change_nothing(saved, images, engine):
    expected = load_int8(saved, engine)(images)
    engines.saturates.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = load_int8(saved, engine)(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert not found.is_inference()


def test_copies_compute_the_same(saved, images):
    model = load_int8(saved)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)


def test_any_batch_in_any_layout(saved, images):
    model = load_int8(saved)
    expected = model(images)
    assert model(images[:0]).shape == (0, 5)
    assert torch.equal(model(images.contiguous()), expected)
    assert torch.equal(model(images.repeat(2, 1, 1, 1)[::2]), expected[[0, 2, 4, 0, 2, 4]])
    for count in (1, 2, 3, 5):
        assert torch.equal(model(images[:count]), expected[:count])


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.byte(), lambda x: x[0], lambda x: x[..., :8],
     lambda x: x[:, :1], lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.numpy(),
     lambda x: x.tolist(), lambda x: None,
     lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)],
)  # fmt: skip
def test_other_types_and_shapes_are_told_in_one_line(saved, images, change):
    with pytest.raises(UserError, match=r"\Athe network takes float32 images[^\n]*\Z"):
        load_int8(saved)(change(images))


def test_nan_in_gives_nan_out(saved, images):
    spoilt = images.clone()
    spoilt[2, 0, 3, 3] = float("nan")
    model = load_int8(saved)
    found = model(spoilt)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], model(images)[others])


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_full_range_where_sums_saturate_is_warned_of(
    observation, tmp_path, monkeypatch, caplog, saturates, reduce_range
):
    path = tmp_path / "model.safetensors"
    save_int8(convert(observation, Settings(reduce_range=reduce_range)), path)
    monkeypatch.setattr(artifact.engines, "saturates", lambda engine: saturates)
    with caplog.at_level(logging.WARNING, logger=cli.log.name):
        load_int8(path)
    assert ("sums of products saturate" in caplog.text) == (saturates and not reduce_range)


def test_an_engine_that_is_not_here_is_told(saved):
    with pytest.raises(UserError, match="no abacus engine"):
        load_int8(saved, "abacus")


def test_the_package_hands_on_its_reader():
    assert quantization.load_int8 is artifact.load_int8
    with pytest.raises(AttributeError):
        quantization.load_int4  # noqa: B018


def test_from_python_a_refusal_is_a_value_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]*no such file\Z"):
        quantization.load_int8(tmp_path / "nothing.safetensors")


def test_a_plain_checkpoint_is_refused(tmp_path, tiny_model):
    path = tmp_path / "fp32.pth"
    torch.save(tiny_model.state_dict(), path)
    with pytest.raises(UserError, match="no INT8 network"):
        load_int8(path)


def test_torchs_compiler_is_not_imported(saved):
    """It would take a second of every process that reads an INT8 model."""
    program = (
        "import sys, torch\n"
        "from quantization import load_int8\n"
        f"load_int8({str(saved)!r})(torch.zeros(1, 3, 12, 12))\n"
        "print({'sympy', 'torch._inductor', 'torch._dynamo'} & set(sys.modules))\n"
    )
    process = run_fresh("-c", program)
    assert process.stdout.strip() == "set()", process.stderr
