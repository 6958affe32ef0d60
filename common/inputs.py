"""What a script that compresses works on: a network with weights, and images to measure it with."""

import argparse
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from common.checkpoints.checkpoint import WEIGHTS_NAME, find_weights, load_network
from common.command.argument_types import AtMost
from common.command.cli import UserError, log
from common.files.untrusted import explained
from common.images import check
from common.images.data import ImageSet, checksum
from common.images.loading import Source, check_disjoint, load_images
from common.images.normalisation import AUTO, NORMALISATIONS
from common.images.sources import open_chosen_source
from common.machine.workers import ALONE, Workers
from common.network.size import describe_network
from common.network.tracing import Traced, trace

MAX_VALUE_BYTES = 1 << 26  # largest FP32 result for a batch; a few exist at a time
MAX_TIMED_BYTES = 1 << 28  # the same for a batch that is timed


@dataclass(frozen=True)
class Inputs:
    """A network and images, loaded."""

    weights: dict  # entry of results.json: where the checkpoint was found, its SHA-256
    model: nn.Module  # FP32, in eval mode
    source: Source  # where images come from
    seed: int  # chooses images
    test: ImageSet
    calibration: ImageSet | None  # training images, where the script asks for some
    family: str = "resnet18-cifar"  # name of the architecture
    own_names: Mapping[str, str] = field(default_factory=dict)  # layers' names in the checkpoint

    @functools.cached_property
    def traced(self) -> Traced:
        """The network as a graph, and how it belongs to the model."""
        return trace(self.model, self.test.shape)

    @property
    def file_stem(self) -> str:
        """First part of the names of the files that hold the network."""
        if self.family == "resnet18-cifar":
            return WEIGHTS_NAME.removesuffix(".pth")
        return re.sub(r"[^A-Za-z0-9]+", "_", self.family.rpartition(":")[2]).strip("_")

    def describe(self) -> dict:
        """Return results.json's ``data``, ``weights`` and ``network``."""
        counts = {"source": self.source.name, "test_images": len(self.test)}
        if self.calibration is not None:
            counts["calibration_images"] = len(self.calibration)
        return {
            "data": counts | self.test.describe(),
            "weights": self.weights,
            "network": describe_network(self.family, self.model, self.traced.network),
        }

    def identify(self) -> dict[str, str]:
        """Return checksums, named for the user."""
        splits = [self.test] if self.calibration is None else [self.test, self.calibration]
        return {
            "the checkpoint": checksum(self.model.state_dict().values()),
            "the images": checksum(t for split in splits for t in (split.images, split.labels)),
        }

    def load_training(self, count: int | None, skip: int = 0, flag: str | None = None) -> ImageSet:
        """Load training images; warn of test images among them, see :func:`check_disjoint`."""
        training = load_images(self.source, "train", count, self.seed, skip, flag)
        check_disjoint(training, self.test, self.source.description)
        return training

    def fit_batch_size(self, asked: int) -> int:
        """Return a default batch size bounded by memory; one that the user chose stays."""
        bounded = isinstance(asked, AtMost)
        return min(asked, self._most_images(MAX_VALUE_BYTES)) if bounded else asked

    def fit_batch_sizes(self, asked: Sequence[int]) -> list[int]:
        """Return the batch sizes to time, without defaults that would take too much memory."""
        most = self._most_images(MAX_TIMED_BYTES)
        left_out = [size for size in asked if isinstance(size, AtMost) and size > most]
        for size in left_out:
            log.info("batch %d is not timed, to save memory; --batch-sizes %d does it", size, size)
        return [size for size in asked if size not in left_out]

    def _most_images(self, value_bytes: int) -> int:
        largest_bytes = 4 * max(map(math.prod, self.traced.network.shapes.values()))
        return max(1, value_bytes // largest_bytes)

    def to(self, device: torch.device) -> "Inputs":
        """Move the model to a device; return the inputs with it and the test images there."""
        return replace(self, model=self.model.to(device), test=self.test.to(device))


def load_inputs(args: argparse.Namespace, script_dir: Path, workers: Workers = ALONE) -> Inputs:
    """Load the checkpoint, then the images; say which they are, and check that they fit.

    All ``workers`` load the same; one on each machine downloads.

    Raises:
        UserError: The checkpoint or the images cannot be had or do not fit, the workers found
            different ones, or the training images are the test images.
    """
    file = find_weights(args.weights, script_dir)
    log.info("weights: %s", file.found)
    chosen = vars(args).get
    max_pool = {"on": True, "off": False}.get(chosen("max_pool"))
    loaded, described = load_network(file, chosen("model"), max_pool), file.describe()
    with workers.one_a_machine_first():
        source = open_chosen_source(args, loaded.statistics)
    test = load_images(source, "test", args.test_images, args.seed, flag="--test-images")
    inputs = Inputs(
        described, loaded.model, source, args.seed, test, None, loaded.family, loaded.own_names
    )
    counts = f"{len(test)} for testing"
    if "calibration_images" in args:
        calibration = inputs.load_training(args.calibration_images, flag="--calibration-images")
        inputs = replace(inputs, calibration=calibration)
        counts += f", {len(calibration)} for calibration"
    log.info("images: %s, from %s", counts, source.description)
    _check_logits(file.path, inputs)
    inputs = _check_images(inputs, chosen("normalize") == AUTO)
    if workers.count > 1:
        workers.require_same(inputs.identify())
    return inputs


@torch.inference_mode()
def _check_logits(path: Path, inputs: Inputs) -> None:
    """Check that a black, a white and a noisy image give finite logits, one for each class."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, inputs.test.shape, generator=generator, dtype=torch.uint8)
    images = torch.stack([torch.zeros_like(noise), torch.full_like(noise, 255), noise])
    network = inputs.traced.network  # first: tracing says in one line what cannot be done
    (count,), class_count = network.shapes[network.graph.output], len(inputs.test.classes)
    if count != class_count:
        raise UserError(
            f"{path}: a network of {count} classes; {inputs.source.description} have {class_count}"
        )
    # Folding would hide an infinite product with a scale of zero.
    with explained(f"the network does not run on {len(images)} images at once"):
        logits = inputs.model(inputs.test.normalize(images))
    if not torch.isfinite(logits).all():
        raise UserError(f"{path}: weights so large that the network's logits are NaN or infinite")


def _check_images(inputs: Inputs, chooses: bool) -> Inputs:
    """Warn if training images do not fit the network; choose their normalisation if asked to."""
    train = inputs.calibration
    wanted = check.AUTO_IMAGES if chooses else check.CHECK_IMAGES
    if train is None or len(train) < wanted:
        try:
            count = len(inputs.source.open_split("train").labels)
        except UserError:
            if chooses:
                raise UserError(f"--normalize auto needs training images; "
                                f"{inputs.source.description} have none") from None  # fmt: skip
            log.info("no training images: not checked whether the images fit the network")
            return inputs
        train = inputs.load_training(min(wanted, count))
    subject = check.Subject(inputs.model, inputs.traced, train.rows(slice(wanted)))
    if chooses:
        name = check.best_normalisation(subject)
        log.info("normalisation: %s fits the network best", name)
        subject = subject.normalised(name)
        mean, std = NORMALISATIONS[name]
        splits = [inputs.test, inputs.calibration]
        test, calibration = (s and replace(s, mean=mean, std=std) for s in splits)
        source = replace(inputs.source, mean=mean, std=std)
        inputs = replace(inputs, source=source, test=test, calibration=calibration)
    for mismatch in check.find_mismatches(subject):
        log.warning("%s", mismatch)
    return inputs
