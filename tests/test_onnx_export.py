"""The ONNX file holds the network's integers, and ONNX Runtime computes what the reference does."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_engines import NETWORKS, make_images

from common.network.tracing import trace_network
from quantization.int8 import engines
from quantization.int8.conversion import convert, observe
from quantization.int8.engines import onnx_engines
from quantization.int8.network import Int8Layer
from quantization.settings import Settings
from runtime.decode import MEANINGS, window_means


def trace(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name]()
    return trace_network(model.eval(), (3, 12, 12))


@pytest.fixture
def network():
    return convert(observe(trace("residual"), make_images(32), "minmax", 16), Settings())


@pytest.fixture
def exported(network, tmp_path):
    onnx_engines.export_onnx(network, tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx")


def constants_of(proto, kind):
    """Return the constants that each node of a kind reads, by the operation's name, in order."""
    values = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == kind:
            constants = [values[name] for name in node.input if name in values]
            found.setdefault(node.name.rpartition("/")[0], []).append(constants)
    return found


@pytest.mark.exact_sums
@pytest.mark.parametrize("fp32_layers", [(), ("stem",), ("fc",)])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_answers_like_the_reference(name, fp32_layers, tmp_path):
    traced, settings = trace(name), Settings(fp32_layers=fp32_layers)
    network = convert(observe(traced, make_images(32), "minmax", 16), settings)
    onnx_engines.export_onnx(network, tmp_path / "model.onnx")
    pixels = make_images(64, seed=1)
    images = pixels.normalize(pixels.images).contiguous()
    got = onnx_engines.load_onnx(tmp_path / "model.onnx")(images)
    expected = engines.runner("reference", network)(images)
    assert (got - expected).square().mean() < 1e-3 * expected.var()
    assert (got.argmax(1) == expected.argmax(1)).double().mean() > 0.98


@pytest.mark.parametrize("name", NETWORKS)
def test_an_fp32_network_can_be_exported_too(name):
    network = trace(name)
    pixels = make_images(4)
    images = pixels.normalize(pixels.images).contiguous()
    got = onnx_engines.load_onnx(onnx_engines.to_onnx(network))(images)
    assert torch.allclose(got, network(images), atol=1e-4)


def test_the_file_holds_the_scales_weights_and_zero_points(network, exported):
    dequantized = constants_of(exported, "DequantizeLinear")
    for name in network.graph.layers:
        layer = network.layers[name]
        (bias, _, _), (levels, scales, zero_points) = dequantized[name][:2]
        assert np.array_equal(levels, layer.weight.numpy())
        assert np.array_equal(scales, layer.scales.numpy())
        assert not zero_points.any()
        source = network.graph[name].inputs[0]
        expected = layer.bias_levels(network.ranges[source].scale).numpy()
        assert bias.dtype == np.int32
        assert np.abs(bias - expected).max() <= 1
    for name, kept in network.ranges.items():
        expected = [np.float32(kept.scale), np.uint8(kept.zero_point)]
        assert constants_of(exported, "QuantizeLinear")[name] == [expected]
        assert dequantized[name][-1] == expected


def test_class_names_and_normalisation_travel_with_the_file(network, exported):
    facts = {item.key: json.loads(item.value) for item in exported.metadata_props}
    assert facts == {
        "classes": list(network.classes),
        "mean": list(network.mean),
        "std": list(network.std),
        "channel_order": "rgb",
        "resize": None,
        "settings": {**asdict(network.settings), "fp32_layers": []},
        "input": MEANINGS["images"],
    }


def test_every_kernel_reads_dequantized_values_and_is_quantized_after(exported):
    nodes = exported.graph.node
    makers = {output: node for node in nodes for output in node.output}
    kinds = Counter(node.op_type for node in nodes)
    assert (kinds["Conv"], kinds["Gemm"], kinds["Add"], kinds["GlobalAveragePool"]) == (9, 1, 7, 2)
    for node in nodes:
        if node.op_type in ("Conv", "Gemm", "Add", "GlobalAveragePool"):
            assert {makers[name].op_type for name in node.input} == {"DequantizeLinear"}, node.name
            users = [user for user in nodes if node.output[0] in user.input]
            allowed = {"Relu", "Clip", "QuantizeLinear", "Flatten"}
            assert {user.op_type for user in users} <= allowed, node.name


def test_the_batch_size_is_free(network):
    run = onnx_engines.load_onnx(onnx_engines.to_onnx(network))
    pixels = make_images(7)
    images = pixels.normalize(pixels.images).contiguous()
    assert run(images).shape == (7, 5)
    assert torch.equal(run(images[:2]), run(images)[:2])


def test_a_bias_beyond_int32_stays_fp32(network):
    layer = network.layers["stem"]
    bias = layer.bias.clone()
    bias[0] = 1e12
    layers = {**network.layers, "stem": Int8Layer(layer.weight, layer.scales, bias)}
    spoilt = type(network)(**{**vars(network), "layers": layers})
    exported = onnx.load_from_string(onnx_engines.to_onnx(spoilt))
    ((bias,),) = constants_of(exported, "Conv")["stem"]
    assert bias.dtype == np.float32
    assert bias[0] == np.float32(1e12)


@pytest.mark.parametrize(("old", "new"), [(6, 3), (7, 3), (1, 7), (5, 5)])
def test_adaptive_pooling_averages_torchs_windows(old, new):
    values = torch.rand(2, old)
    expected = torch.nn.functional.adaptive_avg_pool1d(values, new)
    assert np.allclose(values.numpy() @ window_means(old, new).T, expected, atol=1e-6)
