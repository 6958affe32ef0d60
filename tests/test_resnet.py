"""The network: its size, its names, and its arithmetic against a functional rewrite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cifar import normalize
from resnet18 import ResNet18, Widths, fold_batch_norm, weight_modules


def test_resnet18_has_the_published_size():
    model = ResNet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    layers = weight_modules(model)
    convolutions = [m.weight.numel() for m in layers.values() if isinstance(m, torch.nn.Conv2d)]
    assert (len(convolutions), sum(convolutions)) == (20, 11_159_232)
    assert len(layers) == 21
    assert layers["linear"].weight.numel() == 5120


def test_names_are_those_of_the_course():
    names = set()
    for prefix in ["conv1", "linear"]:
        names.add(f"{prefix}.weight")
    names.add("linear.bias")
    norms = ["bn1"]
    for stage in range(1, 5):
        for block in range(2):
            names |= {f"layer{stage}.{block}.conv{i}.weight" for i in (1, 2)}
            norms += [f"layer{stage}.{block}.bn{i}" for i in (1, 2)]
        if stage > 1:
            names.add(f"layer{stage}.0.shortcut.0.weight")
            norms.append(f"layer{stage}.0.shortcut.1")
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names |= {f"{norm}.{entry}" for norm in norms for entry in entries}
    assert set(ResNet18().state_dict()) == names


def test_forward_equals_a_functional_rewrite(tiny_model, random_images):
    state = tiny_model.state_dict()
    x = random_images(3).images / 255

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{entry}"].view(1, -1, 1, 1)
            for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    out = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = out
            if f"{name}.shortcut.0.weight" in state:
                shortcut = F.conv2d(out, state[f"{name}.shortcut.0.weight"], stride=stride)
                shortcut = norm(shortcut, f"{name}.shortcut.1")
            out = F.conv2d(out, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(
                F.relu(norm(out, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=1
            )
            out = F.relu(norm(out, f"{name}.bn2") + shortcut)
    assert out.shape[-2:] == (4, 4)
    expected = out.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(x), expected)


SLIM = Widths((4, 8, 8, 12), (3, 1, 5, 8, 8, 2, 12, 16))


def test_widths_are_the_shapes():
    assert Widths((4, 8, 16, 32)).inner == (4, 4, 8, 8, 16, 16, 32, 32)
    assert Widths.of(ResNet18(SLIM).state_dict()) == SLIM == ResNet18(SLIM).widths
    layers = weight_modules(ResNet18(SLIM))
    assert layers["layer2.0.conv1"].weight.shape == (5, 4, 3, 3)
    assert layers["layer2.0.conv2"].weight.shape == (8, 5, 3, 3)
    assert layers["layer3.0.shortcut.0"].weight.shape == (8, 8, 1, 1)
    assert ResNet18(SLIM)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("stages", "inner"),
    [((4, 8, 8), ()), ((4, 8, 8, 8), (4,)), ((4, 8, 8, 0), ()), ((4, 8, 8, 1025), ())],
)
def test_widths_that_no_network_has(stages, inner):
    with pytest.raises(ValueError, match="widths from 1 to 1,024"):
        Widths(stages, inner)


@pytest.mark.parametrize("weight", [None, torch.zeros(0, 3, 3, 3), torch.zeros(1025, 1, 1, 1)])
def test_shapes_that_say_no_widths(weight):
    state = ResNet18(SLIM).state_dict() | {"layer3.1.conv1.weight": weight}
    with pytest.raises(ValueError, match=r"layer3\.1\.conv1"):
        Widths.of(state)


@pytest.mark.parametrize("class_count", [2, 10])
def test_class_count_is_the_number_of_logits(class_count):
    model = ResNet18(Widths((4, 4, 4, 4)), class_count=class_count).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, class_count)


def test_fold_batch_norm_keeps_the_function(tiny_model, random_images):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    folded = fold_batch_norm(tiny_model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    images = normalize(random_images(5).images)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), tiny_model(images), rtol=1e-4, atol=1e-4)
