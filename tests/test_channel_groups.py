"""Which channels are free to go, and what removing them leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, Bottleneck, MobileNet, Vgg, build, grouped
from resnet18 import BLOCKS, ResNet18
from torch import nn

from common.checkpoints.resnet import BlockShape, ResNet, ResNetShape
from common.network.tracing import trace, trace_network
from pruning.channels import groups as module
from pruning.channels.costs import WEIGHTS, ChannelCosts
from pruning.channels.groups import find_groups
from pruning.channels.slimming import channels_given, slim_module, slim_network
from pruning.channels.surgeon import ChannelChoice


def groups_of(model, shape=(3, 32, 32)):
    return find_groups(trace_network(model.eval(), shape))


def test_a_resnet18s_are_its_streams_and_the_inner_channels_of_its_blocks():
    groups = groups_of(ResNet18())
    streams = {
        "conv1": ("conv1", "layer1.0.conv2", "layer1.1.conv2"),
        "layer2.0.shortcut.0": ("layer2.0.shortcut.0", "layer2.0.conv2", "layer2.1.conv2"),
        "layer3.0.shortcut.0": ("layer3.0.shortcut.0", "layer3.0.conv2", "layer3.1.conv2"),
        "layer4.0.shortcut.0": ("layer4.0.shortcut.0", "layer4.0.conv2", "layer4.1.conv2"),
    }
    assert groups.keys() == streams.keys() | {f"{block}.conv1" for block in BLOCKS}
    for block in BLOCKS:
        group = groups[f"{block}.conv1"]
        assert group.readers == {f"{block}.conv2": 1}
        assert (group.producers, group.between) == ((f"{block}.conv1",), ())
    for name, producers in streams.items():
        assert (groups[name].producers, groups[name].between) == (producers, ())
    assert set(groups["conv1"].readers) == {
        "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0",
    }  # fmt: skip
    assert set(groups["layer4.0.shortcut.0"].readers) == {"layer4.1.conv1", "linear"}


def test_shortcuts_that_add_channels_of_zeros_keep_their_streams():
    blocks = tuple((BlockShape((w, w), False),) for w in (4, 8))
    model = ResNet(ResNetShape(3, 4, blocks, 10))
    assert list(groups_of(model)) == ["layer1.0.conv1", "layer2.0.conv1"]


def test_channels_before_channels_of_zeros_stay():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 10, 1)

        def forward(self, x):
            x = nn.functional.pad(self.stem(x), (0, 0, 0, 0, 0, 4))
            return self.head(x).mean((2, 3))

    assert groups_of(Padded()) == {}


class AddedToItself(nn.Module):
    """A layer whose outputs are added to its inputs, and one whose outputs scale its inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 10, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.inner(x)
        return self.head(x * self.gate(x).sigmoid()).mean((2, 3))


def test_a_layer_may_give_the_channels_that_it_reads():
    (group,) = groups_of(AddedToItself()).values()
    assert group.producers == ("stem", "inner", "gate")
    assert group.readers == {"inner": 1, "gate": 1, "head": 1}
    costs = ChannelCosts(trace_network(AddedToItself().eval(), (3, 32, 32)))
    assert costs.cost({"stem": 2}, WEIGHTS) == 3 * 2 + 9 * 2 * 2 + 2 * 2 + 2 * 10


def test_sums_that_spread_a_channel_keep_it():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Conv2d(4, 10, 1)

        def forward(self, x):
            return self.head(self.a(x) + self.b(x)).mean((2, 3))

    assert not groups_of(Spread())


def test_expanded_channels_go_with_their_filters_and_gates():
    groups = groups_of(MobileNet())
    first, second = "blocks.0.expand.0", "blocks.1.expand.0"
    assert list(groups) == [
        "stem.0", first, second, "blocks.1.excite.fc1", "blocks.1.project.0", "head",
    ]  # fmt: skip
    assert groups["stem.0"].producers == ("stem.0", "blocks.0.project.0")
    assert groups["stem.0"].readers == {first: 1, second: 1}
    assert groups[first].between == ("blocks.0.filter.0",)
    assert groups[first].readers == {"blocks.0.project.0": 1}
    assert groups[second].producers == (second, "blocks.1.excite.fc2")
    assert groups[second].between == ("blocks.1.filter.0",)
    assert groups[second].readers == {"blocks.1.excite.fc1": 1, "blocks.1.project.0": 1}
    assert groups[second].width == 16


def test_channels_are_followed_through_flattening():
    groups = groups_of(Vgg())
    assert {name: dict(group.readers) for name, group in groups.items()} == {
        "features.0": {"features.4": 1},
        "features.4": {"classifier.1": 4},
        "classifier.1": {"classifier.4": 1},
    }


def test_both_inner_convolutions_of_a_bottleneck_have_free_channels():
    assert list(groups_of(Bottleneck())) == ["stem.0", "down.0", "conv1", "conv2"]
    # The inner convolutions have three groups that would have to shrink alike.
    assert list(groups_of(grouped())) == ["stem.0", "down.0"]


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return self.d(x.relu() * torch.sigmoid(x)).mean((2, 3))


def test_concatenated_channels_are_not_free_and_self_gated_ones_are():
    assert list(groups_of(Concatenated())) == ["c"]


def test_a_reader_of_very_many_inputs_keeps_them_all(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 40)
    assert "features.4" not in groups_of(Vgg())


def choose(network, groups, generator):
    """Choose about half of each group's channels; their readers keep the weights."""
    choices = {}
    for group in groups.values():
        channels = torch.randperm(group.width, generator=generator)[: group.width // 2 + 1]
        channels = channels.sort().values
        layers = {}
        for name, spread in group.readers.items():
            layer = network.layers[name]
            columns = (channels[:, None] * spread + torch.arange(spread)).flatten()
            layers[name] = type(layer)(layer.weight[:, columns], layer.bias)
        choices[group.name] = ChannelChoice(channels, layers)
    return choices


@torch.no_grad()
@pytest.mark.parametrize("make", [*NETWORKS, ResNet18, AddedToItself])
def test_what_is_left_computes_what_the_dense_network_does_without_those_channels(
    make, random_images
):
    """The channels that go made zero in the module, where layers read them."""
    images = random_images(6)
    model = build(make, images)
    traced = trace(model, images.shape)
    groups = find_groups(traced.network)
    choices = choose(traced.network, groups, torch.Generator().manual_seed(0))
    muted = copy.deepcopy(model)
    for group in groups.values():
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[choices[group.name].channels] = False
        for name, spread in group.readers.items():
            muted.get_submodule(name).weight[:, gone.repeat_interleave(spread)] = 0
    slim = slim_network(traced.network, groups, choices)
    pixels = images.normalize(images.images)
    expected = muted(pixels)
    torch.testing.assert_close(slim(pixels), expected, rtol=1e-3, atol=1e-4)
    given = channels_given(groups, choices)
    statistics = {
        name: (torch.zeros(len(layer.bias)), torch.ones(len(layer.bias)))
        for name, layer in slim.layers.items()
    }
    narrow = slim_module(model, traced, slim, given, statistics)
    torch.testing.assert_close(narrow(pixels), expected, rtol=1e-3, atol=1e-4)
    again = trace_network(narrow, images.shape)
    assert {n: again.layers[n].weight.shape for n in again.graph.layers} == {
        n: slim.layers[n].weight.shape for n in slim.graph.layers
    }
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    # It is the module's own kind: named alike, and loaded by name.
    assert narrow.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(slim_network(traced.network, groups, {})(pixels), traced.network(pixels))
