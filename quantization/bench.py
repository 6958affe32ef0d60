"""What INT8 models are calibrated and measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from common.images.data import ImageSet, batches
from common.measure import evaluate
from common.network.resnet import ResNet18
from quantization.int8 import conversion
from quantization.settings import Settings


@dataclass(frozen=True)
class Bench:
    """Images to calibrate on and images to measure on; none is among both.

    Attributes:
        calibration: Training images.
        images: Test images, or training images where something is chosen by them.
        batch_size: In images.
    """

    calibration: ImageSet
    images: ImageSet
    batch_size: int

    def calibrate(self, model: ResNet18, settings: Settings) -> GraphModule:
        """Return a copy of ``model`` with its activations observed on the calibration images."""
        return conversion.calibrate(model, batches(self.calibration, self.batch_size), settings)

    def predict(self, model: nn.Module, description: str) -> torch.Tensor:
        """Return a model's predictions (int64, shape (N,)), made on the CPU."""
        return evaluate.predict(model, self.images, self.batch_size, description)
