"""A small network with every kind of operation, and images for it."""

from __future__ import annotations

import torch
from torch import nn

from common.images.data import ImageSet

SHAPE = (3, 12, 12)
CLASSES = ("cat", "dog", "cow", "fox", "owl")


class EveryKind(nn.Module):
    """Maps images (N, 3, 12, 12) to logits of five classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(8, 8, (1, 3), stride=2, groups=2, dilation=(1, 2))
        self.adaptive = nn.AdaptiveAvgPool2d((3, 2))
        self.hidden = nn.Linear(48, 16)
        self.classify = nn.Linear(16, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.stem_norm(self.stem(x)))
        x = nn.functional.hardswish(self.depthwise(x))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * nn.functional.hardsigmoid(gate)
        x = torch.cat([nn.functional.max_pool2d(x, 2), nn.functional.avg_pool2d(x, 2)], 1)
        x = x.view(x.size(0), 2, 8, 6, 6).transpose(1, 2).contiguous().view(x.size(0), 16, 6, 6)
        first, second = torch.relu(self.norm(x)).chunk(2, 1)
        x = nn.functional.silu(first) + torch.sigmoid(second)
        x = torch.relu(self.grouped(nn.functional.pad(x, (1, 1, 1, 0))))
        x = self.adaptive(x[:, :, ::1, 1:])
        return self.classify(torch.relu(self.hidden(x.flatten(1))))


def make_every_kind() -> EveryKind:
    """Make the network; its batch norms fit its values, so that its classes vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EveryKind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            images = make_images(64)
            model(images.normalize(images.images))
    return model.eval()


def make_images(count: int, seed: int = 0) -> ImageSet:
    """Make random images whose facts are not those of CIFAR-10."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 5, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
