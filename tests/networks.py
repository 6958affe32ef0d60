"""Tiny networks of other kinds than ResNet18, whose batch norms fit their activations."""

from __future__ import annotations

import torch
from torch import nn

from common.images.data import ImageSet
from common.network.execution import Network
from quantization.int8.network import Int8Network


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate made of the mean of all channels."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(self.pool(x)).relu()).sigmoid()


class InvertedResidual(nn.Module):
    """Expand, filter each channel alone, project; add the input back where it fits."""

    def __init__(self, channels: int, inner: int, outputs: int, stride: int, excite: bool):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()
        )
        self.filter = nn.Sequential(
            nn.Conv2d(inner, inner, 5, stride, padding=2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
        )
        self.excite = SqueezeExcite(inner, 4) if excite else nn.Identity()
        self.project = nn.Sequential(
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.adds = stride == 1 and channels == outputs

    def forward(self, x):
        y = self.project(self.excite(self.filter(self.expand(x))))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """Two inverted residuals, the second with squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.blocks = nn.Sequential(
            InvertedResidual(6, 12, 6, 1, False), InvertedResidual(6, 16, 8, 2, True)
        )
        self.head = nn.Conv2d(8, 20, 1)
        self.classifier = nn.Linear(20, 10)

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x))).relu()
        return self.classifier(x.mean((2, 3)))


class Vgg(nn.Module):
    """Convolutions with biases, pooling, flatten, two linear layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(4),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(12 * 4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Bottleneck(nn.Module):
    """A stem and a bottleneck, whose middle convolution may be grouped; ten classes."""

    def __init__(self, groups: int = 1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, 2, 2, dilation=2, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return self.fc((y + self.down(x)).relu().mean((2, 3)))


def grouped() -> nn.Module:
    """Return a bottleneck whose middle convolution has three groups."""
    return Bottleneck(groups=3)


NETWORKS = (MobileNet, Vgg, Bottleneck, grouped)


def build(make, images: ImageSet) -> nn.Module:
    """Return a network in eval mode whose batch norms fit its activations on some images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias, 0, 0.3)
        with torch.no_grad():
            model(images.normalize(images.images))
    return model.eval()


def dequantized(int8: Int8Network) -> Network:
    """Return an INT8 network in FP32, with its levels' weights."""
    return Network(int8.graph, {name: layer.dense() for name, layer in int8.layers.items()})
