"""Every engine computes the integers of the reference, in any thread, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings

import pytest
import torch
from cifar import image_set
from every_kind import EveryKind
from torch import nn

from common.command import cli
from common.command.cli import UserError
from common.machine import device
from common.network.execution import Layer
from common.network.tracing import trace_network
from quantization.int8 import engines
from quantization.int8.conversion import convert, observe
from quantization.int8.engines import base, torch_engine
from quantization.int8.engines.reference import CLIPS, ReferenceRunner
from quantization.int8.network import SAME_RANGE
from quantization.settings import ENGINES, TORCH_ENGINES, Settings

TORCH_HERE = torch_engine.torch_engines()
HERE = engines.available_engines()


class Residual(nn.Module):
    """Additions that fit into a convolution, with and without a ReLU, and some that do not."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        c = self.convs
        x = torch.relu(self.stem(x))
        x = torch.relu(c[1](torch.relu(c[0](x))) + x)
        x = c[2](x) + x  # no activation
        y = c[3](x) + x
        x = torch.relu(c[4](y) + x)  # x was read by the addition before, y is read again
        x = nn.functional.relu6(x + c[5](y))
        x = torch.relu(c[6](x) + nn.functional.adaptive_avg_pool2d(x, 1))  # of another shape
        x = c[7](x) + x.view(-1, 2, 4, 12, 12).view(-1, 8, 12, 12)  # shares memory
        return self.fc(x.mean((2, 3)))


class Mobile(nn.Module):
    """Inverted residuals: depthwise convolutions of more than a hundred channels, and ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.expand = nn.ModuleList(nn.Conv2d(16, 112, 1) for _ in range(2))
        self.depthwise = nn.ModuleList(
            nn.Conv2d(112, 112, k, padding=k // 2, groups=112) for k in (3, 5)
        )
        self.project = nn.ModuleList(nn.Conv2d(112, 16, 1) for _ in range(2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        for expand, depthwise, project in zip(
            self.expand, self.depthwise, self.project, strict=True
        ):
            y = nn.functional.relu6(expand(x))
            x = x + project(nn.functional.relu6(depthwise(y)))
        return self.fc(x.mean((2, 3)))


NETWORKS = {"every kind": EveryKind, "residual": Residual, "mobile": Mobile}


def make_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return image_set(pixels, torch.arange(count) % 5, classes=tuple("abcde"))


@pytest.fixture(scope="module")
def observations():
    found = {}
    for name, kind in NETWORKS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind()
        network = trace_network(model.eval(), (3, 12, 12))
        # Weights that use all levels, so that large products meet.
        layers = {
            layer: Layer(3 * weights.weight, weights.bias)
            for layer, weights in network.layers.items()
            if network.graph[layer].is_layer
        }
        images = make_images(32)
        found[name] = observe(network.with_layers(layers), images, "minmax", 16)
    return found


@pytest.fixture(scope="module")
def images():
    pixels = make_images(8, seed=1)
    return pixels.normalize(pixels.images)


@pytest.fixture
def residual(observations):
    return convert(observations["residual"], Settings())


def exact_values(network, steps, images):
    """Return the values of steps by the reference; additions may be fused into them."""
    reference = ReferenceRunner(network)
    values = {steps[0].name: reference._store(steps[0], images)}
    with torch.inference_mode():
        for step in steps[1:]:
            inputs = [values[name] for name in step.inputs]
            if step.added:
                total = reference._multiply(step, inputs[0])
                total = total + reference._real(step.added, values[step.added])
                values[step.name] = reference._store(step, CLIPS[step.activation](total))
            else:
                values[step.name] = reference._compute(step, *inputs)
    return values


def stored(network, name, value):
    """Return the reference's value in torch's form."""
    kept = network.ranges.get(name)
    if kept is None:
        return value.float()
    levels = (value + kept.zero_point).to(torch.uint8)
    if levels.ndim == 4:
        levels = levels.contiguous(memory_format=torch.channels_last)
    return torch._make_per_tensor_quantized_tensor(levels, kept.scale, kept.zero_point)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("engine", TORCH_HERE)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_gives_the_references_levels(observations, images, name, engine, reduce_range):
    network = convert(observations[name], Settings(reduce_range=reduce_range))
    model = torch_engine.TorchRunner(network, engine)
    steps = model._steps
    values = exact_values(network, steps, images)
    for call, step in zip(model._calls()[1:], steps[1:], strict=True):
        with torch_engine.UsingEngine(engine), torch.no_grad():
            got = call.function(*[stored(network, n, values[n]) for n in call.inputs])
        kept = network.ranges.get(call.name)
        if kept is None:
            assert torch.allclose(got, values[call.name].float(), atol=1e-5), call.name
            continue
        assert (got.q_scale(), got.q_zero_point()) == (kept.scale, kept.zero_point), call.name
        distance = (got.int_repr().double() - kept.zero_point - values[call.name]).abs()
        # Kernels multiply in float32, so that a result next to a half may round the other way.
        assert distance.max() <= 1, (call.name, step.operation.kind)
        if step.operation.kind in SAME_RANGE:
            # An average may lie right between two levels. torch 2.13 then takes the even level,
            # later releases the even distance from the zero point.
            moved = network.fp32_part().compute(step.operation, [values[step.inputs[0]]])
            distance = distance[moved % 1 != 0.5]
            assert not distance.any(), (call.name, step.operation.kind)
            continue
        assert (distance > 0).double().mean() < 0.01, (call.name, step.operation.kind)


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_answer_like_the_reference(observations, images, name, engine):
    network = convert(observations[name], Settings(fp32_layers=("stem",) * (name != "mobile")))
    got = engines.runner(engine, network)(images)
    expected = engines.runner("reference", network)(images)
    noise = (got - expected).square().mean() / expected.var()
    assert noise < 0.02, noise
    assert (got.argmax(1) == expected.argmax(1)).double().mean() >= 0.85


@pytest.mark.skipif("onednn" not in TORCH_HERE, reason="no onednn engine on this CPU")
def test_onnx_runtime_does_not_round_logits(residual, images):
    own = residual.ranges[residual.graph.output]
    exact, rounded = (
        engines.runner(name, residual)(images) for name in ("onnxruntime", "reference")
    )
    levels = exact / own.scale
    assert (levels - levels.round()).abs().max() > 0.1
    low, high = own.limits
    assert torch.allclose(exact.clamp(low, high), rounded, atol=1.01 * own.scale)


def test_onednn_fuses_the_additions_of_one_shape(residual):
    fused, plain = (
        torch_engine.TorchRunner(residual, name)._steps for name in ("onednn", "fbgemm")
    )
    assert sum(step.added is not None for step in fused) == 6
    assert not any(step.added for step in plain)


@pytest.mark.parametrize("engine", HERE)
def test_runners_take_any_number_of_images_in_any_layout(residual, images, engine):
    before = torch.backends.quantized.engine
    run = engines.runner(engine, residual)
    expected = torch.cat([run(image[None]) for image in images])
    for count in (3, 8, 0, *range(1, 8), 3):
        assert torch.equal(run(images[:count]), expected[:count])
    assert torch.equal(run(images.contiguous()), expected)
    assert torch.equal(run(images.flip(0)[::2]), expected.flip(0)[::2])
    with torch.inference_mode():
        assert torch.equal(run(images), expected)
    assert run(images).dtype == torch.float32
    assert not run(images.clone().requires_grad_()).requires_grad
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("engine", HERE)
def test_nan_in_gives_nan_out(residual, images, engine):
    run, spoilt = engines.runner(engine, residual), images.clone()
    spoilt[2, 1, 3, 4] = torch.nan
    logits = run(spoilt)
    assert logits[2].isnan().all()
    others = torch.arange(len(images)) != 2
    assert torch.equal(logits[others], run(images)[others])


@pytest.mark.parametrize("engine", HERE)
def test_wrong_images_are_refused_in_one_line(residual, images, engine):
    run = engines.runner(engine, residual)
    for wrong, said in ((images.double(), "float64"), (images[:, :2], r"\(8, 2, 12, 12\)"),
                        (images[0], r"\(3, 12, 12\)")):  # fmt: skip
        with pytest.raises(UserError, match=rf"takes float32 images \(N, 3, 12, 12\).*{said}"):
            run(wrong)


@pytest.mark.parametrize("engine", HERE)
def test_runners_can_be_copied_and_pickled(residual, images, engine):
    run = engines.runner(engine, residual)
    expected = run(images)
    assert torch.equal(copy.deepcopy(run)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(run))(images), expected)


@pytest.mark.skipif("onednn" not in TORCH_HERE, reason="no onednn engine on this CPU")
def test_batch_sizes_beyond_the_first_few_share_one_program(residual, images, monkeypatch):
    monkeypatch.setattr(base, "MAX_PREPARED_SIZES", 2)
    run = engines.runner("onednn", residual)
    expected = run(images)
    for count in (1, 2, 3, 4, 5, 1, 4):
        assert torch.equal(run(images[:count]), expected[:count])
    assert set(run._programs._programs) == {8, 1, None}


def test_threads_share_models_of_different_engines(residual, images):
    runs = [engines.runner(engine, residual) for engine in TORCH_HERE for _ in range(2)]
    expected = {}
    for run in runs:
        expected.setdefault(run.engine, engines.runner(run.engine, residual)(images))
    before, wrong = torch.backends.quantized.engine, []

    def work(run):
        try:
            for count in (8, 1, 3, 8, 2):
                if not torch.equal(run(images[:count]), expected[run.engine][:count]):
                    wrong.append(run.engine)
        except Exception as error:
            wrong.append(error)

    # First calls, which prepare, meet: two threads share each model.
    threads = [threading.Thread(target=work, args=(run,)) for run in runs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.backends.quantized.engine == before


def test_the_engine_is_restored_even_after_a_failure():
    before = torch.backends.quantized.engine
    with contextlib.suppress(KeyError), torch_engine.UsingEngine(TORCH_HERE[-1]):
        assert torch.backends.quantized.engine == TORCH_HERE[-1]
        raise KeyError
    assert torch.backends.quantized.engine == before


def test_making_and_running_models_warns_of_nothing(residual, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engines.runner(TORCH_HERE[0], residual)(images)


def test_without_torchscript_the_calls_run_from_python(residual, images, monkeypatch):
    expected = engines.runner(TORCH_HERE[0], residual)(images)
    monkeypatch.setattr(torch_engine, "CAN_TRACE", False)
    assert torch.equal(engines.runner(TORCH_HERE[0], residual)(images), expected)


@pytest.mark.parametrize("engine", TORCH_HERE)
def test_what_torch_has_no_integer_kernel_for_is_listed(observations, engine):
    network = convert(observations["every kind"], Settings(fp32_layers=("stem",)))
    listed = engines.runner(engine, network).fp32_operations
    kinds = {network.graph[name].kind for name in listed}
    expected = {"convolution", "affine", "silu", "hardsigmoid"}
    assert kinds == expected | ({"sigmoid"} if engine == "qnnpack" else set())


# --- which engines are here -----------------------------------------------------------------------


def only(monkeypatch, engines_of_torch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", engines_of_torch)


def test_an_engine_that_is_not_here_is_named_with_those_that_are(monkeypatch):
    with pytest.raises(UserError, match=rf"no abacus engine .* it has: .*{TORCH_HERE[0]}"):
        engines.choose_settings("abacus")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_missing_packages_are_named_with_the_command_that_installs_them(engine, monkeypatch):
    packages = engines.PACKAGES[engine]
    for missing in (packages[:1], packages[1:], packages):
        monkeypatch.setattr(
            engines.importlib.util, "find_spec", lambda name, missing=missing: name not in missing
        )
        command = f"pip install {' '.join(missing)}$"
        with pytest.raises(UserError, match=f"{engine} needs more packages: {command}"):
            engines.require_engine(engine)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name in packages)
    engines.require_engine(engine)


@pytest.mark.parametrize("saturates", [False, True])
def test_activations_have_seven_bits_where_sums_saturate(monkeypatch, saturates):
    monkeypatch.setattr(engines, "saturates", lambda engine: saturates)
    engine = TORCH_HERE[0]
    assert engines.choose_settings(engine).reduce_range == saturates
    assert engines.choose_settings(engine, reduce_range="on").reduce_range
    assert engines.choose_settings(engine, "minmax", "off") == Settings(engine, False, "minmax")


@pytest.mark.parametrize("saturates", [False, True])
def test_the_probe_finds_what_saturates(monkeypatch, saturates):
    class Saturating(ReferenceRunner):
        def _multiply(self, step, levels):
            exact = super()._multiply(step, levels)
            return exact.clamp(max=200) if saturates and step.name == "dense" else exact

    monkeypatch.setitem(engines.RUNNERS, "reference", Saturating)
    assert engines.saturates.__wrapped__("reference") == saturates


@pytest.mark.skipif(not device.has_vnni(), reason="sums of products may saturate on this CPU")
@pytest.mark.parametrize("engine", HERE)
def test_engines_add_exactly_on_a_cpu_with_vnni(engine):
    assert not engines.saturates(engine)


def test_no_engine_is_told(monkeypatch):
    only(monkeypatch, ["none"])
    for choose in (engines.fastest_engine, engines.default_engines):
        with pytest.raises(UserError, match="no INT8 engine"):
            choose()


def test_candidates_are_here_and_qnnpack_only_alone(monkeypatch):
    assert set(engines.candidate_engines()) <= set(HERE) - {"reference"} <= set(ENGINES)
    only(monkeypatch, ["none", "qnnpack"])
    assert "qnnpack" in engines.candidate_engines()
    only(monkeypatch, ["qnnpack", "fbgemm"])
    assert {*engines.candidate_engines()} & {*TORCH_ENGINES} == {"fbgemm"}


@pytest.mark.parametrize(
    ("supported", "expected"),
    [(["none", "qnnpack"], "qnnpack"), (["qnnpack", "onednn"], "qnnpack"), (["onednn"], "onednn"),
     (["qnnpack", "fbgemm", "x86"], "fbgemm")],
)  # fmt: skip
def test_where_there_is_no_fbgemm_one_line_says_what_is_used(
    supported, expected, monkeypatch, capsys
):
    cli.set_up_messages(quiet=False)
    only(monkeypatch, supported)
    assert engines.default_engines() == [expected]
    assert capsys.readouterr().err.count("\n") == (expected != "fbgemm")
