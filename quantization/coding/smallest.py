"""The network coded to a wanted size, as a file that was read back and measured."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.command.cli import log
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import Paired, predict
from common.network.size import saved_size_bytes
from quantization.coding.encoder import encode
from quantization.coding.target import Coding, code_to_bits
from quantization.files.artifact import load_int8
from quantization.files.int8_file import save_int8
from quantization.int8.conversion import convert_coded
from quantization.int8.network import Int8Network
from quantization.settings import Settings


@dataclass(frozen=True)
class CodingSetup:
    """What networks are coded and measured with.

    Attributes:
        inputs: The network, calibration images and test images.
        images: Training images to code on; their labels are not used.
        fp32: FP32's predictions on the test images (int64, shape (N,)).
        settings: How the network is quantized; no layer stays in FP32.
        batch_size: Number of images in a batch.
    """

    inputs: Inputs
    images: ImageSet
    fp32: torch.Tensor
    settings: Settings
    batch_size: int

    def write_coded(self, price: float, path: Path) -> Coding:
        """Code the network at a price of a bit, as :func:`encode` takes it, and write its file."""
        dense, calibration = self.inputs.traced.network, self.inputs.calibration
        layers = encode(dense, self.images, price, self.inputs.seed)
        settings = replace(self.settings, fp32_layers=())
        network = convert_coded(dense, layers, calibration, settings, self.batch_size)
        return Coding(price, bits_per_weight(network, save_int8(network, path)), network)

    def measure(self, network: Int8Network, path: Path) -> dict:
        """Write a network, read it back, and evaluate that; return results.json's entry."""
        file_bytes, test = save_int8(network, path), self.inputs.test
        model = load_int8(path, self.settings.engine)
        predictions = predict(model, test, self.batch_size, "evaluate coded")
        return {
            "file_bytes": file_bytes,
            "size_ratio": saved_size_bytes(self.inputs.model.state_dict()) / file_bytes,
            "size_ratio_given": self.inputs.weights["size_bytes"] / file_bytes,
            "bits_per_weight": bits_per_weight(network, file_bytes),
            **Paired.of(self.fp32 == test.labels, predictions == test.labels).as_dict(),
        }


def bits_per_weight(network: Int8Network, file_bytes: int) -> float:
    """Return how many bits of its whole file a network has for each weight."""
    return 8 * file_bytes / sum(layer.weight.numel() for layer in network.layers.values())


def write_smallest(setup: CodingSetup, bits_wanted: float, path: Path) -> dict:
    """Write a file of about ``bits_wanted`` for each weight; return results.json's ``coding``."""
    network = code_to_bits(lambda price: setup.write_coded(price, path), bits_wanted).network
    point = setup.measure(network, path)
    log.info("%s: %.1f times smaller than FP32", path.name, point["size_ratio"])
    images = len(setup.images)
    return {"images": images, "file": path.name, "bits_wanted": bits_wanted, **point}
