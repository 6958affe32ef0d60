"""What INT8 networks are calibrated and measured with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.images.data import ImageSet
from common.measure import evaluate
from common.network.execution import Network
from quantization.int8 import conversion
from quantization.int8.conversion import Observation
from quantization.settings import Settings


@dataclass(frozen=True)
class CalibrationSetup:
    """Images to calibrate on and images to measure on; none is among both."""

    calibration: ImageSet  # training images
    images: ImageSet  # test images, or training images where something is chosen by them
    batch_size: int  # number of images in a batch

    def observe(self, network: Network, settings: Settings) -> Observation:
        """Observe a network's values on the calibration images."""
        return conversion.observe(network, self.calibration, settings.observer, self.batch_size)

    def predict(
        self, model: Callable[[torch.Tensor], torch.Tensor], description: str
    ) -> torch.Tensor:
        """Return a model's predictions (int64, shape (N,)), made on the CPU."""
        return evaluate.predict(model, self.images, self.batch_size, description)
