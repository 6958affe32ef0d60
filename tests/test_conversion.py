"""INT8 conversion, checked against integer arithmetic done by hand."""

from __future__ import annotations

import copy
import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import run_fresh
from torch.fx import GraphModule

from common.images.data import batches, normalize
from quantization.int8 import conversion, engines
from quantization.int8.operations import list_operations
from quantization.settings import OBSERVERS, Settings

ENGINES = engines.candidate_engines()
REPOSITORY = Path(__file__).resolve().parents[1]


def test_torch_ao_is_imported_in_one_place():
    folders = ("common", "quantization", "pruning", "pipeline", "training", "benchmarks")
    sources = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    importing = re.compile(r"^ *(from|import) torch\.(ao|quantization)\b", re.MULTILINE)
    found = [path.name for path in sources if importing.search(path.read_text(encoding="utf-8"))]
    assert found == ["conversion.py"]


def test_torchs_compiler_is_not_imported():
    """It would take a second of every process that reads an INT8 model."""
    program = (
        "import sys\n"
        "from common.network.resnet import Widths\n"
        "from quantization.int8 import conversion, engines\n"
        "settings = engines.choose_settings(engines.fastest_engine())\n"
        "conversion.build_skeleton(settings, Widths((4, 4, 4, 4), (4,) * 8))\n"
        "print('torch._inductor' in sys.modules or 'torch._dynamo' in sys.modules)\n"
    )
    process = run_fresh("-c", program)
    assert process.stdout.strip() == "False", process.stderr


def test_every_observer_that_can_be_chosen_is_one_of_torchs():
    assert tuple(conversion.ACTIVATION_OBSERVERS) == OBSERVERS


@pytest.fixture
def observed(calibrate):
    return calibrate(Settings())


@pytest.fixture
def images(random_images):
    return normalize(random_images(16, seed=1).images)


@pytest.mark.exact_sums
@torch.inference_mode()
def test_first_convolution_is_integer_arithmetic(observed, images):
    converted = conversion.convert(observed, Settings(ENGINES[0]))
    layer = converted.get_submodule("conv1")
    scale = converted.conv1_input_scale_0.item()
    zero_point = converted.conv1_input_zero_point_0.item()
    quantized = torch.quantize_per_tensor(images, scale, zero_point, torch.quint8)
    weight = layer.weight()
    steps = scale * weight.q_per_channel_scales()
    sums = F.conv2d(
        quantized.int_repr().double() - zero_point,
        weight.int_repr().double(),
        (layer.bias().double() / steps).round(),
        padding=1,
    )
    exact = sums * (steps / layer.scale).view(1, -1, 1, 1) + layer.zero_point
    wanted = exact.round().clamp(layer.zero_point, 255)  # the ReLU is fused
    got = layer(quantized).int_repr().double()
    is_tie = (exact - exact.floor() - 0.5).abs() < 1e-3  # FP32 may round it either way
    assert torch.equal(got[~is_tie], wanted[~is_tie])
    assert is_tie.double().mean() < 0.02


@pytest.mark.exact_sums
@pytest.mark.parametrize("engine", ENGINES)
@torch.inference_mode()
def test_logits_are_close_to_fp32(engine, tiny_model, observed, images):
    expected = tiny_model(images)
    got = conversion.convert(observed, Settings(engine))(images)
    noise = (got - expected).square().mean() / expected.square().mean()
    assert noise < 0.01  # 20 dB
    assert not torch.equal(got, expected)


def test_conversion_leaves_the_calibrated_model_as_it_is(observed):
    before = copy.deepcopy(observed.state_dict())
    conversion.convert(observed, Settings(ENGINES[0]))
    after = observed.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv2", "layer2.0.shortcut.0", "linear"])
def test_layers_left_in_fp32_and_no_others(layer, convert):
    converted = convert(Settings(ENGINES[0], fp32_layers=(layer,)))
    floating = [name for name, is_int8 in list_operations(converted).items() if not is_int8]
    assert floating == [layer]


def test_a_layer_that_stayed_fp32_unasked_is_an_error(tiny_model, random_images):
    settings = Settings(ENGINES[0], fp32_layers=("layer1.0.conv2",))
    observed = conversion.calibrate(tiny_model, batches(random_images(8), 8), settings)
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv2"):
        conversion.convert(observed, replace(settings, fp32_layers=()))


def test_reduced_range_uses_seven_bits(convert):
    scales = []
    for reduce_range in (False, True):
        converted = convert(Settings(ENGINES[0], reduce_range, "minmax"))
        scales.append(converted.conv1_input_scale_0.item())
    assert scales[1] / scales[0] == pytest.approx(255 / 127, rel=1e-3)


def test_conversions_leave_no_models_behind(tiny_model, random_images):
    """torch.ao keeps what it meets in a cache; 21 layers' worth of that were gigabytes."""
    settings = Settings(ENGINES[0])
    observed = conversion.calibrate(tiny_model, batches(random_images(8), 8), settings)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), GraphModule) for thing in gc.get_objects())

    conversion.convert(observed, settings)
    before = alive()
    for _ in range(3):
        exempt = replace(settings, fp32_layers=("conv1",))
        conversion.convert(conversion.reuse_ranges(observed, tiny_model, exempt), exempt)
    assert alive() == before
