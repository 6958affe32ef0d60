import pytest
import torch
import torchvision
from torch import nn

from common.command.cli import UserError
from common.network.tracing import trace, trace_network


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that folding has to use."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(norm.bias, 0, 0.1, generator=generator)
    return model.eval()


def assert_same(model: nn.Module, shape=(3, 8, 8)) -> None:
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        found = trace_network(model, shape)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class Net(nn.Module):
    """Convolution, whatever is tested, flatten, linear."""

    def __init__(self, function, features):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.function = function if isinstance(function, nn.Module) else None
        self.call = None if isinstance(function, nn.Module) else function
        self.fc = nn.Linear(features, 5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.call(x) if self.function is None else self.function(x)
        return self.fc(x.view(x.size(0), -1))


class NormAndMore(nn.Module):
    """A convolution that not only its batch norm reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


@pytest.mark.parametrize(
    ("function", "features"),
    [
        (NormAndMore(), 256),
        (lambda x: x + x.view(-1, 2, 2, 8, 8).relu().view(-1, 4, 8, 8), 256),
        (nn.Hardtanh(0, 6), 256),
        (nn.AdaptiveAvgPool2d((3, 2)), 24),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), 100),
        (nn.MaxPool2d(3, 2, dilation=2), 16),
        (nn.Sequential(nn.Dropout(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid()), 256),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), 256),
        (lambda x: x.clamp(0, 6).add(x).mul(torch.sigmoid(x)), 256),
        (lambda x: nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), 128),
        (lambda x: nn.functional.avg_pool2d(x, x.size()[3]), 4),
        (
            lambda x: torch.cat([x.chunk(2, 1)[i] for i in (1, 0)], 1).transpose(2, 3).contiguous(),
            256,
        ),
        (lambda x: x.view(x.shape[0], 2, 2, 8, 8).permute(0, 2, 1, 3, 4).contiguous(), 256),
        (lambda x: x.mean((-1, -2), keepdim=True) * x, 256),
    ],
)
def test_every_kind_computes_what_torch_does(function, features):
    assert_same(with_statistics(Net(function, features)))


def test_batch_norms_are_folded_and_named():
    traced = trace(with_statistics(Net(nn.BatchNorm2d(4), 256)), (3, 8, 8))
    assert traced.norms == {"conv": "norm"}
    kinds = [operation.kind for operation in traced.network.graph.operations]
    assert kinds == ["input", "convolution", "affine", "flatten", "linear"]


def test_shapes_and_macs_by_hand():
    network = trace_network(with_statistics(Net(nn.MaxPool2d(2), 64)), (3, 8, 8))
    assert network.shapes["conv"] == (4, 8, 8)
    assert network.macs == {"conv": 4 * 3 * 9 * 64, "fc": 64 * 5}


def test_values_given_and_wanted_are_not_overwritten():
    network = trace_network(with_statistics(Net(nn.ReLU(inplace=True), 256)), (3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    found = network.run({"x": images}, ["conv", "function"])
    torch.testing.assert_close(found["function"], found["conv"].relu())
    assert (found["conv"] < 0).any()
    again = network.run({"conv": found["conv"]}, [network.graph.output])
    torch.testing.assert_close(again["fc"], network(images))
    assert (found["conv"] < 0).any()


def test_module_is_left_as_it_was():
    model = with_statistics(Net(nn.ReLU(inplace=True), 256))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, (3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bf16_network_gives_fp32_logits_near_those_of_fp32():
    torch.manual_seed(0)
    model = with_statistics(torchvision.models.mobilenet_v3_small(num_classes=5))
    network, images = trace_network(model, (3, 32, 32)), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected, found = network(images), network.to(torch.bfloat16)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (nn.GroupNorm(2, 4), "function is GroupNorm, which is not supported; known kinds: conv"),
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d"),
        (torch.softmax, "does not run|cannot be traced"),
        (lambda x: x + 1, "not computed from the image"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be traced"),
        (lambda x: x.roll(1, 0), "roll"),
    ],
)
def test_what_is_not_known_is_told_in_one_line(function, words):
    with pytest.raises(UserError, match=words) as error:
        trace(Net(function, 256).eval(), (3, 8, 8))
    assert "\n" not in str(error.value)


def test_layer_that_is_used_twice_is_refused():
    convolution = nn.Conv2d(4, 4, 1)
    model = Net(nn.Sequential(convolution, nn.ReLU(), convolution), 256).eval()
    with pytest.raises(UserError, match=r"function\.0 is used twice"):
        trace(model, (3, 8, 8))


class WithTargets(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x, targets=None, with_features=False):
        features = x.flatten(1)
        logits = self.linear(features)
        if targets is not None:
            return nn.functional.cross_entropy(logits, targets)
        return (logits, features) if with_features else logits


def test_what_forward_may_take_beside_images_keeps_its_default():
    assert_same(WithTargets().eval(), (3, 2, 2))
