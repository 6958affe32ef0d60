"""What a script that compresses works on: a checkpoint, and images to measure it with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.command.cli import log
from common.images.data import Cifar10, check_disjoint, checksum, load_images
from common.images.sources import Source, open_source
from common.machine.workers import ALONE, Workers
from common.network.checkpoint import find_weights, load_model
from common.network.resnet import ResNet18


@dataclass(frozen=True)
class Inputs:
    """A checkpoint and images, loaded.

    Attributes:
        weights: results.json's ``weights``: where the checkpoint was found, and its SHA-256.
        model: The network with these weights, FP32, in eval mode.
        source: Where images come from.
        seed: Of their choice.
        test: Images to measure on.
        calibration: Training images to calibrate on; none, where the script asks for none.
    """

    weights: dict
    model: ResNet18
    source: Source
    seed: int
    test: Cifar10
    calibration: Cifar10 | None

    def describe_images(self) -> dict:
        """Return results.json's ``data``."""
        counts = {"source": self.source.name, "test_images": len(self.test)}
        if self.calibration is not None:
            counts["calibration_images"] = len(self.calibration)
        return counts

    def identify(self) -> dict[str, str]:
        """Return checksums, named for the user."""
        splits = [self.test] if self.calibration is None else [self.test, self.calibration]
        return {
            "the checkpoint": checksum(self.model.state_dict().values()),
            "the images": checksum(t for split in splits for t in (split.images, split.labels)),
        }

    def load_training(self, count: int | None, skip: int = 0) -> Cifar10:
        """Load training images; arguments as of :func:`common.images.data.load_images`.

        Warns if some of them are test images.

        Raises:
            UserError: They cannot be had, or nearly all of them are test images.
        """
        training = load_images(self.source, "train", count, self.seed, skip)
        check_disjoint(training, self.test, self.source.description)
        return training

    def to(self, device: torch.device) -> Inputs:
        """Move the model to a device; return the inputs with it and the test images there."""
        return replace(self, model=self.model.to(device), test=self.test.to(device))


def load_inputs(args: argparse.Namespace, script_dir: Path, workers: Workers = ALONE) -> Inputs:
    """Load the checkpoint, then the images, and say which they are.

    Args:
        args: With the flags that the scripts share, and perhaps the number of calibration images.
        script_dir: Where the checkpoint may lie, see
            :func:`common.network.checkpoint.find_weights`.
        workers: All load the same; one a machine downloads.

    Raises:
        UserError: The checkpoint or the images cannot be had, the workers found different ones, or
            the training images are the test images.
    """
    file = find_weights(args.weights, script_dir)
    log.info("weights: %s", file.found)
    model, described = load_model(file.path), file.describe()
    with workers.one_a_machine_first():
        source = open_source(args.data_dir, args.bundled, not args.no_bundled)
    test = load_images(source, "test", args.test_images, args.seed)
    inputs = Inputs(described, model, source, args.seed, test, calibration=None)
    counts = f"{len(test)} for testing"
    if "calibration_images" in args:
        inputs = replace(inputs, calibration=inputs.load_training(args.calibration_images))
        counts += f", {len(inputs.calibration)} for calibration"
    log.info("images: %s, from %s", counts, source.description)
    if workers.count > 1:
        workers.require_same(inputs.identify())
    return inputs
