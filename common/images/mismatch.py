"""How far the inputs of a network's batch norms are from what they saw in training."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.checkpoints.resnet import ResNet
from common.images.data import ImageSet
from common.images.normalisation import NORMALISATIONS
from common.network.graph import CONVOLUTION
from common.network.tracing import Traced

CHECK_IMAGES = 256
CHUNK = 32
# Mean divergences in nats a channel. Right constants give 0.002, or 0.008 if training augmented
# colours; ImageNet's for CIFAR-10's 0.014 to 0.027, a std of 0.25 for 0.20 0.044 to 0.057, others
# above 0.3. JPEG images fit networks trained on original pixels worse: ImageNet's constants, with
# which they were trained, give ResNet-20 and ResNet-56 0.045 to 0.050, CIFAR-10's 0.02. No
# threshold tells these two apart, and it hardly matters: of 10,000 test images, ResNet-20 gets
# 8,103 and 8,079 right with them, ResNet-56 8,320 and 8,332.
FITS = 0.01
CLEARLY_WORSE = 3.0


@dataclass(frozen=True)
class Subject:
    """What is checked."""

    model: nn.Module  # in eval mode, on the CPU
    traced: Traced  # the same network, traced
    train: ImageSet  # some training images with their labels

    def first(self, count: int) -> "Subject":
        """Return the subject with fewer images."""
        return replace(self, train=self.train.rows(slice(count)))

    def prepared(self, **changes: object) -> "Subject":
        """Return the subject with images of another mean, std or order of channels."""
        return replace(self, train=replace(self.train, **changes))

    def normalised(self, name: str) -> "Subject":
        """Return the subject with images normalised by known constants."""
        mean, std = NORMALISATIONS[name]
        return self.prepared(mean=mean, std=std)


def mismatch_after_stem(subject: Subject) -> float:
    """Return the mismatch at the batch norm after the first convolution; 0 without one."""
    graph, norms = subject.traced.network.graph, subject.traced.norms
    for name in graph.layers:
        is_stem = graph[name].kind == CONVOLUTION and graph[name].inputs == (graph.input,)
        if is_stem and name in norms:
            stem, norm = map(subject.model.get_submodule, (name, norms[name]))
            return _divergence(norm, stem, subject.first(CHECK_IMAGES).train)
    return 0.0


def better_max_pool(subject: Subject) -> str | None:
    """Return ``on`` or ``off`` if the max pool after a ResNet's 3×3 stem should be changed."""
    model = subject.model
    if not isinstance(model, ResNet) or model.shape.stem_kernel != 3:
        return None
    images, block, scores = subject.first(CHECK_IMAGES // 2).train, model.layer1[0], {}
    for name, pool in {"on": nn.MaxPool2d(3, 2, 1), "off": nn.Identity()}.items():
        before = nn.Sequential(model.conv1, model.bn1, model.relu, pool, block.conv1)
        scores[name] = _divergence(block.bn1, before, images)
    present, other = ("off", "on") if isinstance(model.maxpool, nn.Identity) else ("on", "off")
    return other if scores[present] > max(FITS, CLEARLY_WORSE * scores[other]) else None


def _divergence(norm: nn.Module, before: nn.Module, images: ImageSet) -> float:
    """Return how far a batch norm's inputs are from its running statistics; 0 if it has none.

    It is the divergence of two normal distributions, KL(observed || running), mean over channels.
    The inputs are what ``before`` gives for the images, (N, C, H, W).
    """
    mean, variance = norm.running_mean, norm.running_var
    if variance is None or torch.equal(variance, variance[:1].expand_as(variance)):
        return 0.0  # folded into the weights, as in a file of coded weights
    observed_mean, observed = _moments(before(batch) for batch, _ in images.batches(CHUNK))
    alive = (variance > 1e-6 * variance.max()) & (observed > 1e-6 * observed.max())
    ratio = observed[alive] / variance[alive]
    shift = (observed_mean - mean)[alive].square() / variance[alive]
    return float((0.5 * (ratio + shift - 1 - ratio.log())).sum() / alive.sum().clamp(min=1))


def _moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each channel (float64) over batches, of which one is kept."""
    count, sums, squares = 0, 0.0, 0.0
    for values in batches:
        variance, mean = (x.double() for x in torch.var_mean(values, (0, 2, 3), correction=0))
        size = values.numel() // len(mean)
        count += size
        sums += size * mean
        squares += size * (variance + mean.square())
    mean = sums / count
    return mean, squares / count - mean.square()
