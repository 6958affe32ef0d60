"""The ONNX file holds torch's integers and scales, and ONNX Runtime computes what torch does."""

from __future__ import annotations

import importlib.util
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from common.command.cli import UserError
from common.images.data import normalize
from quantization.files import onnx_export
from quantization.int8 import engines
from quantization.settings import Settings

ENGINE = engines.candidate_engines()[0]


@pytest.fixture
def converted(convert):
    return convert(Settings(ENGINE))


@pytest.mark.exact_sums
@pytest.mark.parametrize(
    "fp32_layers", [(), ("conv1",), ("layer1.0.conv2",), ("layer2.0.shortcut.0",), ("linear",)]
)
@torch.inference_mode()
def test_onnx_runtime_computes_what_torch_computes(convert, random_images, tmp_path, fp32_layers):
    model = convert(Settings(ENGINE, fp32_layers=fp32_layers))
    path = tmp_path / "model.onnx"
    onnx_export.export_onnx(model, path)
    images = normalize(random_images(64, seed=1).images)
    expected, got = model(images), onnx_export.load_onnx(path)(images)
    if not fp32_layers:  # the same integers everywhere; a tie of rounding moves a few logits
        assert (got - expected).abs().max() <= 3.1 * model.get_submodule("linear").scale
        assert torch.isclose(got, expected, atol=1e-5).double().mean() > 0.95
    # An FP32 layer makes more ties; one that ONNX Runtime quantized makes ten times the noise.
    assert (got - expected).square().mean() < 5e-4 * expected.square().mean()


def test_the_file_holds_torchs_scales_weights_and_zero_points(converted, tmp_path):
    path = tmp_path / "model.onnx"
    onnx_export.export_onnx(converted, path)
    proto = onnx.load(path)
    values = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    for name in ("layer1.0.conv1", "layer4.0.shortcut.0", "linear"):
        layer, prefix = converted.get_submodule(name), name.replace(".", "_")
        assert values[f"{prefix}_scale"] == np.float32(layer.scale)
        assert values[f"{prefix}_zero_point"] == layer.zero_point
        weight = values[f"{prefix}_weight_levels"]
        assert weight.dtype == np.int8
        assert np.array_equal(weight, layer.weight().int_repr().numpy())
        assert values[f"{prefix}_bias_levels"].dtype == np.int32
        bias = values[f"{prefix}_bias_levels"] * values[f"{prefix}_bias_scale"].astype(np.float64)
        assert np.allclose(bias, layer.bias().detach().numpy(), rtol=1e-5)


def test_every_kernel_reads_dequantized_values_and_is_quantized_after(converted, tmp_path):
    path = tmp_path / "model.onnx"
    onnx_export.export_onnx(converted, path)
    nodes = onnx.load(path).graph.node
    makers = {output: node for node in nodes for output in node.output}
    kinds = Counter(node.op_type for node in nodes)
    assert (kinds["Conv"], kinds["Gemm"], kinds["Add"], kinds["GlobalAveragePool"]) == (20, 1, 8, 1)
    for node in nodes:
        if node.op_type in ("Conv", "Gemm", "Add", "GlobalAveragePool"):
            assert {makers[name].op_type for name in node.input} == {"DequantizeLinear"}, node.name
            users = [user for user in nodes if node.output[0] in user.input]
            assert {user.op_type for user in users} <= {"Relu", "QuantizeLinear"}, node.name


def test_the_batch_size_is_free(converted, random_images, tmp_path):
    path = tmp_path / "model.onnx"
    onnx_export.export_onnx(converted, path)
    run = onnx_export.load_onnx(path)
    images = normalize(random_images(7).images)
    assert run(images).shape == (7, 10)
    assert torch.equal(run(images[:2]), run(images)[:2])


def test_a_bias_beyond_int32_stays_fp32(converted, tmp_path):
    layer = converted.get_submodule("conv1")
    with engines.quiet_torch(ENGINE):
        weight, bias = layer.weight(), layer.bias().clone()
        bias[0] = 1e12
        layer.set_weight_bias(weight, bias)
    path = tmp_path / "model.onnx"
    onnx_export.export_onnx(converted, path)
    values = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    assert values["conv1_bias"].dtype == np.float32
    assert values["conv1_bias"][0] == np.float32(1e12)


@pytest.mark.parametrize("missing", [{"onnx"}, {"onnxruntime"}, {"onnx", "onnxruntime"}])
def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    with pytest.raises(UserError, match="pip install onnx onnxruntime") as caught:
        onnx_export.require_packages()
    assert all(name in str(caught.value) for name in missing)


def test_nothing_is_missing_here():
    onnx_export.require_packages()
