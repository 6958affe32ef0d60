"""The deployed forms compute what the converted model computes."""

from __future__ import annotations

import pytest
import torch
from processes import run_fresh
from torch.fx import Graph

from common.command import cli
from common.images.data import normalize
from common.network import packing
from common.network.resnet import fold_batch_norm
from quantization.int8 import deploy, engines
from quantization.settings import Settings

ENGINES = engines.candidate_engines()
ALL_ENGINES = sorted({*torch.backends.quantized.supported_engines} - {"none"})
MIXED = [(), ("conv1",), ("layer1.0.conv2",), ("layer2.0.shortcut.0",), ("linear",)]


@pytest.fixture
def images(random_images):
    return normalize(random_images(16, seed=1).images)


def kernels(model):
    return [str(node.target) for node in model.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("fp32_layers", MIXED)
@torch.inference_mode()
def test_flat_models_compute_bit_for_bit_the_same(convert, images, fp32_layers):
    converted = convert(Settings(ENGINES[0], fp32_layers=fp32_layers))
    code = converted.code
    flat = deploy.flatten(converted, ENGINES[0])
    assert torch.equal(flat(images), converted(images))
    assert converted.code == code
    called = [node.target for node in flat.graph.nodes if node.op == "call_module"]
    assert called == ["avgpool"] or set(called) == {"avgpool", *fp32_layers}


@pytest.mark.skipif("onednn" not in ENGINES, reason="no onednn engine on this CPU")
@pytest.mark.parametrize("fp32_layers", MIXED)
@torch.inference_mode()
def test_onednn_fuses_every_addition_after_an_int8_convolution(convert, images, fp32_layers):
    converted = convert(Settings("onednn", fp32_layers=fp32_layers))
    flat = deploy.flatten(converted, "onednn")
    torch.backends.quantized.engine = "onednn"
    fused = sum("conv2d_add_relu" in kernel for kernel in kernels(flat))
    assert fused == (7 if "layer1.0.conv2" in fp32_layers else 8)
    expected, got = converted(images), flat(images)
    # One rounding fewer a block: never far from the unfused model, and no further from FP32.
    assert (got - expected).square().mean() < 0.005 * expected.square().mean()
    assert torch.equal(flat(images), got)  # the inputs' memory was not overwritten


@pytest.mark.skipif("onednn" not in ENGINES, reason="no onednn engine on this CPU")
def test_a_residual_that_is_read_again_is_not_overwritten(convert):
    converted = convert(Settings("onednn"))
    graph = Graph()
    output = graph.graph_copy(converted.graph, {})
    additions = [node for node in graph.nodes if node.target is torch.ops.quantized.add_relu]
    residual = additions[0].args[1]
    graph.output((output, residual))
    with pytest.raises(RuntimeError, match="read again"):
        deploy.flatten(torch.fx.GraphModule(converted, graph), "onednn")


@pytest.mark.skipif(not deploy.CAN_FREEZE, reason="this Python has no TorchScript")
@pytest.mark.parametrize("engine", ALL_ENGINES)
@torch.inference_mode()
def test_frozen_models_compute_bit_for_bit_the_same(convert, images, engine):
    flat = deploy.flatten(convert(Settings(engine)), engine)
    torch.backends.quantized.engine = engine
    frozen = deploy.freeze(flat)
    assert torch.equal(frozen(images), flat(images))
    assert torch.equal(frozen(images[:3]), flat(images[:3]))  # not the batch size of the trace


@pytest.mark.parametrize("engine", ALL_ENGINES)
@torch.inference_mode()
def test_deployed_models_take_any_batch_size_in_any_order(convert, images, engine):
    converted = convert(Settings(engine))
    flat, deployed = deploy.flatten(converted, engine), deploy.Deployed(converted, engine)
    others = {*torch.backends.quantized.supported_engines} - {engine, "none"}
    torch.backends.quantized.engine = min(others, default=engine)
    for count in (3, 16, 3, 1, *range(1, 2 + deploy.MAX_BATCH_SIZES), 3):
        with engines.quiet_torch(engine):
            expected = flat(images[:count])
        assert torch.equal(deployed(images[:count]), expected)


@pytest.mark.skipif("onednn" not in ENGINES, reason="no onednn engine on this CPU")
@torch.inference_mode()
def test_weights_are_packed_anew_for_every_batch_size(convert, images):
    converted = convert(Settings("onednn"))
    flat = deploy.flatten(converted, "onednn")
    packed = converted.get_submodule("conv1")._packed_params
    assert flat.conv1_packed is not packed
    assert torch.equal(flat.conv1_packed.unpack()[0].int_repr(), packed.unpack()[0].int_repr())


@pytest.mark.skipif("onednn" not in ENGINES, reason="no onednn engine on this CPU")
@torch.inference_mode()
def test_many_batch_sizes_prepare_no_more_than_a_few_models(
    convert, random_images, monkeypatch, capsys
):
    cli.set_up_messages(quiet=True)
    converted, frozen = convert(Settings("onednn")), []
    freeze = deploy.freeze
    monkeypatch.setattr(deploy, "freeze", lambda *args: frozen.append(args[1]) or freeze(*args))
    flat, deployed = deploy.flatten(converted, "onednn"), deploy.Deployed(converted, "onednn")
    images = normalize(random_images(40, seed=1).images)
    for count in [*range(40, 0, -1), *range(1, 41)]:
        with engines.quiet_torch("onednn"):
            expected = flat(images[:count])
        assert torch.equal(deployed(images[:count]), expected)
    assert frozen == [*range(40, 40 - deploy.MAX_BATCH_SIZES, -1)]
    assert capsys.readouterr().err.count("or others, are slower") == 1


THREADS = """
import sys, threading
import torch
from common.network.resnet import ResNet18, Widths
from quantization.int8 import conversion, deploy
from quantization.settings import Settings

torch.set_num_threads(1)
torch.manual_seed(0)
images = torch.randn(24, 3, 32, 32)
converted = {}
for engine in sys.argv[1:]:
    settings = Settings(engine)
    network = ResNet18(Widths((4, 8, 8, 8), (4,) * 8)).eval()
    observed = conversion.calibrate(network, [(images, None)], settings)
    converted[engine] = conversion.convert(observed, settings)
models = {engine: deploy.Deployed(model, engine) for engine, model in converted.items()}
alone = {engine: deploy.Deployed(model, engine) for engine, model in converted.items()}
start, answers = threading.Barrier(4), []

def call(engine, seed):
    start.wait()
    for count in [(5 * seed + 3 * step) % 24 + 1 for step in range(60)]:
        with torch.inference_mode():
            got = models[engine](images[:count])
        answers.append((engine, count, got))

threads = [
    threading.Thread(target=call, args=(engine, seed)) for engine in models for seed in range(2)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with torch.inference_mode():
    right = sum(torch.equal(got, alone[e](images[:count])) for e, count, got in answers)
print(right)
"""


@pytest.mark.skipif(len(ENGINES) < 2, reason="one engine on this CPU")
def test_two_models_are_prepared_and_called_in_four_threads():
    for _ in range(3):
        finished = run_fresh("-W", "ignore", "-c", THREADS, ENGINES[0], ENGINES[-1])
        assert finished.stdout == "240\n", finished.stderr


@torch.inference_mode()
def test_fp32_at_its_best_computes_the_same(tiny_model, images, monkeypatch):
    expected = fold_batch_norm(tiny_model).to(memory_format=torch.channels_last)(images)
    for can_pack in {False, packing.can_pack()}:
        monkeypatch.setattr(packing, "can_pack", lambda can_pack=can_pack: can_pack)
        best = deploy.deploy_fp32(tiny_model)
        assert isinstance(best, torch.fx.GraphModule) == can_pack
        assert torch.allclose(best(images), expected, atol=1e-5)


@torch.inference_mode()
def test_fp32_freezes_too(tiny_model, images):
    folded = fold_batch_norm(tiny_model).to(memory_format=torch.channels_last)
    assert torch.allclose(deploy.freeze(folded)(images), tiny_model(images), atol=1e-4)


def test_without_torchscript_the_model_itself_is_deployed(monkeypatch, tiny_model):
    monkeypatch.setattr(deploy, "CAN_FREEZE", False)
    assert deploy.freeze(tiny_model) is tiny_model
