"""Training between two codings: what the first made zero stays zero, the others learn.

The network learns to do as the dense one does; then it is coded again. Its zeros cost little, and
its other weights know that the zeros are there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from common.images.data import Cifar10
from common.network.coded import CodedLayer
from common.network.resnet import ResNet18
from quantization.coding.encoder import encode
from training.loop.distillation import Training, distill

LEARNING_RATE = 0.0001


def encode_and_train(
    folded: ResNet18, calibration: Cifar10, price: float, training: Training, seed: int
) -> dict[str, CodedLayer]:
    """Code a network, train it, and code it again; return its layers as :func:`encode` does.

    Args:
        folded: As for :func:`encode`, but trained in place.
        calibration: Images to code on.
        price: Of a bit.
        training: What to learn from.
        seed: Of the positions, and of the training.

    Raises:
        UserError: The loss is no longer finite.
    """
    train(folded, encode(folded, calibration, price, seed), training, seed)
    return encode(folded, calibration, price, seed)


def train(
    folded: ResNet18, layers: Mapping[str, CodedLayer], training: Training, seed: int
) -> None:
    """Train a folded network (changed in place) from its coded weights towards its dense answers.

    It runs where the images lie, and comes back to the CPU.

    Raises:
        UserError: The loss is no longer finite.
    """
    device = training.images.images.device
    teacher = copy.deepcopy(folded).to(device, memory_format=torch.channels_last)
    for name, layer in layers.items():
        module = folded.get_submodule(name)
        module.weight.data, module.bias.data = layer.dense(), layer.bias.clone()
    distill(folded, teacher, training, seed, LEARNING_RATE)
    folded.cpu()
