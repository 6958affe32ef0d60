"""What the search tries: slim networks, in INT8 with all their bits or coded.

Each is made on calibration images without labels, kept in the run's store, and judged in INT8, as
it will run, on the images that choose.
"""

import copy
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from common.command import cli
from common.fitting.targets import Targets
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.tracing import trace_network
from common.search.budget import Budget, standard_error
from common.search.trials import Trial
from pipeline.store import Store
from pruning.channels.costs import MACS
from pruning.channels.slimmer import CODED_NATS, Slimmer
from quantization.coding.encoder import Original, coding_targets, encode, estimate_price
from quantization.int8 import engines
from quantization.int8.conversion import convert, convert_coded, observe
from quantization.int8.network import Int8Network
from quantization.settings import Settings
from training.loop.distillation import Training, distill

RANGE_IMAGES = 512  # of the calibration images: those that set INT8's ranges
PRICE_IMAGES = 512  # of those that choose: they say, without labels, where the search begins
TRAINED = "-trained"  # ends the name of what was


@dataclass(frozen=True)
class Candidate(Trial):
    """A network that was tried.

    Its strength is the price of a bit; of a network that is not coded, how many times fewer
    multiply-adds, or weights, it has.
    """

    goal: str  # ``size``, ``speed`` or ``both``
    path: Path  # its INT8 file
    slim_path: Path  # file of the slim FP32 network that it was made from
    macs: int  # number of multiply-adds for an image
    trained: bool  # whether it learned from the dense network

    @property
    def file_bytes(self) -> int:
        """Size of the INT8 file."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class CandidateBuilder:
    """Makes candidates from one dense network."""

    # The dense network, on the CPU; images to code and to repair on, and to set INT8's ranges.
    inputs: Inputs
    settings: Settings  # settings of INT8
    budget: Budget  # accuracy that may be lost, and the images that choose
    store: Store  # networks that were made
    batch_size: int  # number of images in a batch
    training: Training | None = None  # how to train candidates; None to train none

    def quantize(self, model: nn.Module) -> Int8Network:
        """Return a network in INT8, with all its bits, as quantization.py makes it."""
        images = self._range_images
        network = trace_network(model, images.shape)
        return convert(
            observe(network, images, self.settings.observer, self.batch_size), self.settings
        )

    def try_slim(
        self, goal: str, share: float, unit: str = MACS, trained: bool = False
    ) -> Candidate:
        """Remove channels until ``share`` of the multiply-adds, or weights, is left.

        If ``trained``, the network then learns to answer as the dense one does.
        """
        widths = self.slimmer.widths(share, unit)
        key = f"slim-{zlib.crc32(repr(sorted(widths.items())).encode()):08x}"
        slim, path = self.store.slim(key, lambda: self.slimmer.slim(share, unit))
        if trained:
            key += TRAINED
            slim, path = self.store.slim(key, lambda untrained=slim: self._finetune(untrained))
        coded, coded_path = self.store.int8(f"{key}-int8", lambda: self.quantize(slim))
        macs = sum(trace_network(slim, self.inputs.calibration.shape).macs.values())
        return self._judge(Candidate(1 / share, None, goal, coded_path, path, macs, trained), coded)

    def coder(self, goal: str, base: Candidate) -> tuple[float, Callable[[float], Candidate]]:
        """Return the price of a bit at which a candidate's slim network, once coded, may just pass.

        Beside it is returned what codes that network at a price, and judges it.
        """
        inputs, model = self.inputs, self.store.read_slim(base.slim_path)
        dense, slim = inputs.traced.network, trace_network(model, inputs.calibration.shape)
        looked_at = self.budget.choosing.images.rows(slice(PRICE_IMAGES))
        first = estimate_price(slim, dense, looked_at, CODED_NATS * self.budget.max_drop)

        @functools.cache  # the targets are the same at every price
        def targets() -> Targets:
            channels = self.slimmer.channels_of(model)
            if base.trained:  # its channels are others by now
                channels = dict.fromkeys(channels)
            return coding_targets(slim, inputs.calibration, inputs.seed, Original(dense, channels))

        def code(price: float) -> Int8Network:
            layers = encode(slim, targets(), price)
            return convert_coded(slim, layers, self._range_images, self.settings, self.batch_size)

        def attempt(price: float) -> Candidate:
            key = f"{base.slim_path.stem}-coded-{price:.7f}"
            coded, path = self.store.int8(key, lambda: code(price))
            return self._judge(replace(base, strength=price, goal=goal, path=path), coded)

        return first, attempt

    def _judge(self, candidate: Candidate, coded: Int8Network) -> Candidate:
        """Return a candidate with the verdict on its INT8 network."""
        model = engines.runner(self.settings.engine, coded)

        def find_correct(images: ImageSet) -> torch.Tensor:
            return predict(model, images, self.batch_size, "judge") == images.labels

        verdict = self.budget.judge(find_correct)
        outcome = "within the budget"
        if not verdict.passes:
            is_over = verdict.comparison.drop > self.budget.max_drop
            outcome = "over the budget" if is_over else "too uncertain"
        error = standard_error(verdict.comparison, verdict.accuracy.total)
        cli.log.info(  # 0 - x: the negative of 0 is shown as -0.00
            "%s%s: %.2f MB, %.0f million multiply-adds, %+.2f ± %.2f points on %s images that "
            "choose: %s",
            candidate.goal, ", trained" * candidate.trained, candidate.file_bytes / 1e6,
            candidate.macs / 1e6, 0 - 100 * verdict.comparison.drop, 100 * error,
            f"{verdict.accuracy.total:,}", outcome,
        )  # fmt: skip
        return replace(candidate, verdict=verdict)

    def _finetune(self, slim: nn.Module) -> nn.Module:
        device = self.training.images.images.device
        trained, dense = (copy.deepcopy(model).to(device) for model in (slim, self.inputs.model))
        distill(
            trained, dense, self.training, self.inputs.seed,
            precision=self.store.precision(device), channels=self.slimmer.channels_of(slim),
        )  # fmt: skip
        return trained.cpu()

    @property
    def _range_images(self) -> ImageSet:
        return self.inputs.calibration.rows(slice(RANGE_IMAGES))

    @functools.cached_property
    def slimmer(self) -> Slimmer:
        """What removes channels, and knows how many can go."""
        inputs = self.inputs
        device = inputs.calibration.images.device
        dtype = torch.bfloat16 if self.store.precision(device) == "bf16" else torch.float32
        return Slimmer(inputs.model, inputs.traced, inputs.calibration, inputs.seed, dtype)
