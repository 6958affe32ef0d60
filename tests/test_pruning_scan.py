"""The branching scan against the plain way: a full forward pass of a pruned deep copy."""

import contextlib

import pytest
import torch
from cifar import image_set, normalize
from hypothesis import given, settings
from hypothesis import strategies as st
from resnet18 import ResNet18, Widths, weight_modules
from torch import nn

from common.command.cli import UserError
from common.files.output import OutputFolder
from common.network import cascade
from common.network.branching import branch_logits, start_values
from common.network.execution import Layer
from common.network.tracing import trace_network
from pruning.alone.brute_force import pruned_copy
from pruning.alone.scan import Scan, run_scan, scan_images


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed, stage_channels=(4, 8, 8, 8)):
    """A network whose batch norms do something."""
    torch.manual_seed(seed)
    model = ResNet18(Widths(stage_channels))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            torch.nn.init.uniform_(module.weight, 0.3, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def make_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return image_set(images, torch.randint(0, 10, (count,), generator=generator))


def plain_correct(model, dataset, layer, amount):
    with torch.inference_mode():
        logits = pruned_copy(model, {layer: amount})(normalize(dataset.images))
    return logits.argmax(dim=1) == dataset.labels


def run(model, dataset, amounts, fast, layers=None, batch_size=4, finished=None):
    layers = layers or list(weight_modules(model))
    scan = Scan(model, dataset, layers, amounts, batch_size, fast)
    return scan_images(scan, {} if finished is None else finished)


def masked_layers(model, network, amounts):
    """Folded layers without the weights that torch's own pruning removes."""
    return {
        name: network.layers[name].masked(
            pruned_copy(model, {name: amount}).get_submodule(name).weight != 0
        )
        for name, amount in amounts.items()
    }


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([(4, 8, 8, 8), (4, 4, 4, 4), (2, 3, 4, 5)]),
    amount=st.floats(0.05, 0.98),
    data=st.data(),
)
def test_branches_equal_full_forward_passes(seed, channels, amount, data):
    """Any layers, in any order, each on images of its own."""
    model = make_model(seed, channels)
    layers = data.draw(st.permutations(list(weight_modules(model))))
    layers = layers[: data.draw(st.integers(1, len(layers)))]
    rows = {
        layer: torch.tensor(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
        for layer in layers
    }
    dataset = make_images(4, seed)
    images, network = dataset.normalize(dataset.images), trace_network(model, dataset.shape)
    with torch.inference_mode():
        variants = masked_layers(model, network, dict.fromkeys(layers, amount))
        wanted = start_values(network.graph, layers)
        dense = network.run({network.graph.input: images}, wanted)
        before = {name: value.clone() for name, value in dense.items()}
        found = branch_logits(network, dense, variants, rows)
        expected = torch.cat(
            [pruned_copy(model, {layer: amount})(images)[rows[layer]] for layer in layers]
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, dense[name]) for name, value in before.items())


class Joins(nn.Module):
    """Additions that may overwrite either operand or none, a product, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(9, 5)

    def forward(self, x):
        a = self.a(x)
        b = a + self.b(a.relu())
        c = self.c(b).relu() + b
        c = (c + c) * b.mean((2, 3), keepdim=True).sigmoid()
        return self.fc(torch.cat([x, a.relu(), c], 1).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joins_take_the_dense_value_where_a_variant_has_none(dtype):
    torch.manual_seed(0)
    network = trace_network(Joins().eval(), (3, 8, 8)).to(dtype)
    layers = ["c", "fc", "a", "b"]
    variants = {name: Layer(-network.layers[name].weight, network.layers[name].bias)
                for name in layers}  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        dense = network.run({"x": images}, start_values(network.graph, layers))
        found = branch_logits(network, dense, variants)
        expected = torch.cat([network.with_layers({n: v})(images) for n, v in variants.items()])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fast", [False, True])
def test_scan_gives_the_correctness_of_full_passes(fast):
    model, dataset = make_model(1), make_images(24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, dataset, [0.5, 0.9], fast, batch_size=1)
    for (amount, layer), correct in result.correct.items():
        assert torch.equal(correct, plain_correct(model, dataset, layer, amount)), layer
    assert len(result.correct) == 2 * 21
    assert (result.recheck is not None) == fast
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def make_close_model(images):
    """Two classes ahead of the others, level in the median image once conv1 is pruned."""
    model = make_model(2)
    with torch.no_grad():
        model.linear.bias[:2] = 20.0
        logits = pruned_copy(model, {"conv1": 0.9})(normalize(images))
        model.linear.bias[1] += (logits[:, 0] - logits[:, 1]).median()
    return model


@pytest.mark.parametrize("second_look", [True, False])
def test_close_bf16_predictions_are_decided_in_fp32(monkeypatch, second_look):
    """Without the second look this fails, so bf16 alone is not simply right anyway."""
    if not second_look:
        monkeypatch.setattr(cascade, "SAFETY_FACTOR", 1e-9)
    images = make_images(96).images
    model = make_close_model(images)
    with torch.inference_mode():
        classes = pruned_copy(model, {"conv1": 0.9})(normalize(images)).argmax(dim=1)
    dataset = image_set(images, classes)
    result = run(model, dataset, [0.9], True, ["conv1"], batch_size=32)
    assert bool(result.correct[0.9, "conv1"].all()) == second_look
    assert result.recheck.predictions == 96
    assert bool(result.recheck.changed) == second_look


def test_resumed_scan_redoes_nothing_and_ends_the_same(monkeypatch):
    model, dataset = make_model(3), make_images(40)
    whole, finished = run(model, dataset, [0.9], True, batch_size=2), {}
    calls, original = [], cascade.Cascade.predict

    def counted(self, *args):
        if len(calls) == 18 and not resumed:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(cascade.Cascade, "predict", counted)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        run(model, dataset, [0.9], True, batch_size=2, finished=finished)
    resumed = True
    calls.clear()
    second = run(model, dataset, [0.9], True, batch_size=2, finished=finished)
    assert len(calls) == 20 - 16  # the first chunk of 16 batches was finished
    assert torch.equal(second.features, whole.features)
    assert torch.equal(second.dense_correct, whole.dense_correct)
    assert second.recheck == whole.recheck
    for key, correct in whole.correct.items():
        assert torch.equal(second.correct[key], correct)


def test_a_scan_of_another_network_is_neither_used_nor_lost(tmp_path):
    dataset = make_images(20)

    def run_with(seed, resume=False, overwrite=False, fails=True):
        scan = Scan(make_model(seed), dataset, ["conv1", "linear"], [0.9], 4, False)
        with contextlib.suppress(InterruptedError), OutputFolder(tmp_path, overwrite) as folder:
            found = run_scan(scan, folder, resume)
            if fails:
                raise InterruptedError
        return found

    run_with(4)
    with pytest.raises(UserError, match="left by a run that differs in the checkpoint;"):
        run_with(5, resume=True)
    torch.set_num_threads(2)
    with pytest.raises(UserError, match="differs in the number of threads;"):
        run_with(4, resume=True)
    torch.set_num_threads(1)
    assert run_with(4, resume=True)[1] is None  # no seconds, as all of it was done before
    fresh, seconds = run_with(5, overwrite=True)
    assert seconds is not None
    assert torch.equal(
        fresh.correct[0.9, "conv1"], plain_correct(make_model(5), dataset, "conv1", 0.9)
    )
