"""What the search tries: slim networks, in INT8 with all their bits or coded.

Each is made on calibration images without labels, kept in the run's store, and judged in INT8, as
it will run, on the images that choose.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from common.command import cli
from common.images.data import Cifar10, batches
from common.inputs import Inputs
from common.measure.budget import Budget, Verdict, doubling_looks
from common.measure.evaluate import predict
from common.network.checkpoint import load_model
from common.network.coded import CodedNetwork
from common.network.resnet import ResNet18, fold_batch_norm
from common.network.size import count_macs
from pipeline.store import Store
from pruning.channels.slimmer import MACS, Slimmer
from quantization.coding.encoder import Original, encode
from quantization.coding.kernels import assemble, from_int8, to_int8
from quantization.int8 import conversion, deploy
from quantization.settings import Settings
from training.loop.distillation import Training, distill

RANGE_IMAGES = 512  # of the calibration images: those that set INT8's ranges
TRAINED = "-trained"  # ends the name of what was
# A candidate that has lost so many standard errors more than the budget is not looked at further.
CLEARLY_OUT = 3.0


@dataclass(frozen=True)
class Candidate:
    """A network that was tried.

    Attributes:
        goal: ``size``, ``speed`` or ``both``.
        kept: What steers the search, the less the smaller or faster: of coding 1 / price of a
            bit, of removing channels the share that is left.
        verdict: On the images that choose.
        path: Of its coded file.
        slim_path: Of the slim FP32 network that it was made from.
        macs: Multiply-adds an image.
        trained: Whether it learned from the dense network.
    """

    goal: str
    kept: float
    verdict: Verdict
    path: Path
    slim_path: Path
    macs: int
    trained: bool

    @property
    def spare(self) -> float:
        """What is left of the budget."""
        return self.verdict.spare

    @property
    def file_bytes(self) -> int:
        """The size of the coded file."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Workshop:
    """Makes candidates from one dense network.

    Attributes:
        inputs: The dense network, on the CPU; images to code and to repair on, and to set INT8's
            ranges.
        settings: Of INT8.
        budget: Judges.
        store: Keeps what is made.
        batch_size: In images.
        training: For the candidates that are trained; None: there are none.
    """

    inputs: Inputs
    settings: Settings
    budget: Budget
    store: Store
    batch_size: int
    training: Training | None = None

    def quantize(self, model: ResNet18) -> CodedNetwork:
        """Return a network in INT8 as quantization.py makes it, in the form of a coded file."""
        loader = batches(self._range_images, self.batch_size)
        observed = conversion.calibrate(model, loader, self.settings)
        return from_int8(conversion.convert(observed, self.settings), self.settings)

    def try_slim(
        self, goal: str, share: float, unit: str = MACS, trained: bool = False
    ) -> Candidate:
        """Remove channels until ``share`` of the multiply-adds, or weights, is left.

        If ``trained``, the network then learns to answer as the dense one does.
        """
        key = f"{unit}-{share:.4f}"
        slim, path = self.store.slim(key, lambda: self._slimmer.slim(share, unit))
        if trained:
            key += TRAINED
            slim, path = self.store.slim(key, lambda untrained=slim: self._finetune(untrained))
        coded, coded_path = self.store.coded(f"{key}-int8", lambda: self.quantize(slim))
        return self._judge(goal, share, coded, coded_path, path, trained)

    def try_coded(self, goal: str, kept: float, base: Candidate) -> Candidate:
        """Code the slim network of a candidate at a price of a bit of 1 / ``kept``."""

        def code() -> CodedNetwork:
            slim = load_model(base.slim_path)
            channels = None if base.trained else self._slimmer.channels_of(slim)
            original = Original(fold_batch_norm(self.inputs.model), channels)
            layers = encode(
                fold_batch_norm(slim), self.inputs.calibration, 1 / kept, self.inputs.seed,
                original,
            )  # fmt: skip
            return assemble(layers, self._range_images, self.settings, self.batch_size)

        coded, path = self.store.coded(f"{base.slim_path.stem}-coded-{kept:.5f}", code)
        return self._judge(goal, kept, coded, path, base.slim_path, base.trained)

    def _judge(
        self,
        goal: str,
        kept: float,
        coded: CodedNetwork,
        path: Path,
        slim_path: Path,
        trained: bool,
    ) -> Candidate:
        converted, settings = to_int8(coded)
        model = deploy.Deployed(converted, settings.engine)

        def find_correct(images: Cifar10) -> torch.Tensor:
            return predict(model, images, self.batch_size, "judge") == images.labels

        looks = doubling_looks(len(self.budget.images))
        verdict = self.budget.judge(find_correct, looks, CLEARLY_OUT)
        macs = count_macs(ResNet18(coded.widths))
        candidate = Candidate(goal, kept, verdict, path, slim_path, macs, trained)
        cli.log.info(
            "%s%s: %.2f MB, %.0f million multiply-adds, %+.2f points on %s images that choose: %s",
            goal, ", trained" * trained, candidate.file_bytes / 1e6, macs / 1e6,
            -100 * verdict.comparison.drop, f"{verdict.shown:,}",
            "within the budget" if verdict.passes else "over it",
        )  # fmt: skip
        return candidate

    def _finetune(self, slim: ResNet18) -> ResNet18:
        device = self.training.images.images.device
        trained, dense = (copy.deepcopy(model).to(device) for model in (slim, self.inputs.model))
        precision = self.store.precision(device)
        distill(trained, dense, self.training, self.inputs.seed, precision=precision)
        return trained.cpu()

    @property
    def _range_images(self) -> Cifar10:
        return self.inputs.calibration.rows(slice(RANGE_IMAGES))

    def least_share(self, unit: str) -> float:
        """Return the smallest share of the ``unit`` that can be left."""
        return self._slimmer.least_share(unit)

    @functools.cached_property
    def _slimmer(self) -> Slimmer:
        inputs = self.inputs
        device = inputs.calibration.images.device
        dtype = torch.bfloat16 if self.store.precision(device) == "bf16" else torch.float32
        return Slimmer(inputs.model, inputs.calibration.images, inputs.seed, dtype)
