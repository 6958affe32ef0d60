"""A network's weights coded layer by layer, on calibration images without labels.

Every layer is coded on the inputs that the coded layers before it give, and towards the outputs
that the dense network has there: of a block's second convolution, those after the shortcut is
added. What the layers before lost, a layer makes up for as far as it can (as in GPTAQ, Li et al.,
2025, arXiv:2504.02692): its weights become those of the ridge regression from the coded inputs to
the dense outputs, and these are coded. The bias takes up the mean of what is left.

A network that was made from another one is coded towards that one's outputs, and makes up for what
it had lost before as well. Within its blocks, a network without some channels is to give what the
others gave there; a trained one, whose channels are not the same any more, what it gives itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common.command import cli
from common.command.cli import UserError
from common.images.data import Cifar10, normalize
from common.network.coded import CodedLayer
from common.network.resnet import BLOCKS, BasicBlock, ResNet18, prunable_layers
from quantization.coding.levels import MAX_LEVEL, choose_levels

BATCH_SIZE = 50
POSITIONS = 8  # of each image's outputs, at random, that a layer is coded on
RIDGE = 0.01  # of the mean variance of a layer's inputs
REPAIR_RIDGE = 0.2  # the same for the regression, which would otherwise fit the images at hand
FINE_LAYERS = ("conv1",)  # 0.02 % of the weights; coarser than 8 bits, the stem cost four points
# A layer's error counts as a share of its outputs' variance. A bit a weight, for all of a layer's,
# may cost the price times this power of its size; so one bit the price times one power less.
SIZE_POWER, REFERENCE_SIZE = 0.5, 1e6
SMALLEST_SPREAD = 1e-3  # after a layer of zeros alone, inputs do not vary but for rounding
SMALLEST_STEP = 2.0**-14  # that FP16 holds in full
STEP_PRICES = 60.0  # the square of a step, in prices of a bit


@dataclass(frozen=True)
class Original:
    """The network that another was made from.

    Attributes:
        model: FP32, in eval mode, its batch-norms folded; not changed.
        channels: Of each block, which of its inner channels are left (int64); None where training
            has made others of them.
    """

    model: ResNet18
    channels: Mapping[str, torch.Tensor] | None


@torch.inference_mode()
def encode(
    folded: ResNet18,
    calibration: Cifar10,
    price: float,
    seed: int = 0,
    original: Original | None = None,
) -> dict[str, CodedLayer]:
    """Code a network's weights; return its layers by name, in network order.

    Args:
        folded: FP32, in eval mode, on the CPU, its batch-norms folded; left as it is.
        calibration: Images; each is used as it is and mirrored.
        price: Of a bit, in millionths of the outputs' variance.
        seed: Of the positions at which outputs are looked at.
        original: What the network was made from, if from another.
    """
    images = torch.cat([calibration.images, calibration.images.flip(3)])
    original = original or Original(folded, dict.fromkeys(BLOCKS, slice(None)))
    return _Encoder(folded, original, price, seed).encode(images)


class _Encoder:
    """Holds the networks; the coded one's layers are replaced one by one.

    What all images are after some layers is kept in float16: half the memory, and exact enough to
    learn from.
    """

    def __init__(self, folded: ResNet18, original: Original, price: float, seed: int):
        self._own, self._dense, self._coded = folded, original.model, copy.deepcopy(folded)
        self._channels, self._price = original.channels, price
        self._generator = torch.Generator().manual_seed(seed)
        self._layers: dict[str, CodedLayer] = {}

    def encode(self, images: torch.Tensor) -> dict[str, CodedLayer]:
        """Code every layer on these images."""
        names = prunable_layers(self._coded)
        self._progress = iter(cli.progress(names, "code"))
        pixels = _in_batches(normalize, images)
        dense = _in_batches(self._dense.conv1, pixels)
        coded = self._code("conv1", pixels, dense).relu_()
        own = _in_batches(self._own.conv1, pixels).relu_() if self._channels is None else None
        for block in BLOCKS:
            whole, part = (net.get_submodule(block) for net in (self._dense, self._own))
            dense.relu_()
            if own is None:
                wanted = _in_batches(
                    partial(_some_outputs, whole.conv1, self._channels[block]), dense
                )
            else:
                wanted, own = _in_batches(part.conv1, own), _in_batches(part, own)
            inner = self._code(f"{block}.conv1", coded, wanted).relu_()
            del wanted  # half a gigabyte for 2,000 images
            if f"{block}.shortcut.0" in names:
                outputs = _in_batches(whole.shortcut, dense)
                coded = self._code(f"{block}.shortcut.0", coded, outputs)
            dense = _in_batches(partial(_sum_of, whole), dense)
            coded = self._code(f"{block}.conv2", inner, dense, coded).relu_()
            del inner
        dense, coded = (_in_batches(lambda x: x.relu().mean((2, 3)), x) for x in (dense, coded))
        self._code("linear", coded, _in_batches(self._dense.linear, dense))
        return {name: self._layers[name] for name in names}

    def _code(
        self,
        name: str,
        inputs: torch.Tensor,
        wanted: torch.Tensor,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Code a layer so that its outputs and ``added`` give what is wanted; return their sum.

        Args:
            name: Of the layer.
            inputs: That the coded layers before it give.
            wanted: Of the layer's outputs' shape.
            added: The same; what is returned takes its memory.
        """
        next(self._progress)
        coded = self._coded.get_submodule(name)
        samples = self._sample(coded, inputs, wanted, added)
        layer = _code_layer(coded, samples, self._price, name in FINE_LAYERS)
        coded.weight.copy_(layer.dense())
        coded.bias.copy_(layer.bias)
        self._layers[name] = layer
        if added is None:
            return _in_batches(coded, inputs)
        return _in_batches(lambda x, a: coded(x) + a, inputs, added, into=added)

    def _sample(
        self,
        layer: nn.Module,
        inputs: torch.Tensor,
        wanted: torch.Tensor,
        added: torch.Tensor | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs (n, columns) and the outputs wanted of them (n, outputs).

        Of a convolution less what is ``added`` to them.
        """
        for x, y, a in _batches(inputs, wanted, added):
            if isinstance(layer, nn.Linear):
                yield x, y
                continue
            height, width = y.shape[2:]
            count = min(POSITIONS, height * width)
            order = torch.rand(len(x), height * width, generator=self._generator).argsort(1)
            image, place = torch.arange(len(x))[:, None], order[:, :count]
            row, column = place // width, place % width
            y = y[image, :, row, column]
            if a is not None:
                y = y - a[image, :, row, column]
            (size, _), (stride, _) = layer.kernel_size, layer.stride
            padded = F.pad(x, [layer.padding[0]] * 4)
            windows = padded.unfold(2, size, stride).unfold(3, size, stride)
            yield windows[image, :, row, column].flatten(2).flatten(0, 1), y.flatten(0, 1)


def _take_moments(
    layer: nn.Module, samples: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return moments of a layer's inputs, and of what its outputs lack of those wanted.

    Inputs and outputs are taken less the mean of the first samples: behind layers of zeros they
    hardly vary, and the difference of two equal moments would be nothing but rounding errors.

    Args:
        layer: With a weight of (outputs, columns).
        samples: Inputs (n, columns) and the outputs that are wanted of them (n, outputs).

    Returns:
        The inputs' covariance and mean, the covariance and mean of what lacks, the variance of what
        is wanted.
    """
    weight = layer.weight.flatten(1)
    outputs, columns = weight.shape
    inner, cross, count = torch.zeros(columns, columns), torch.zeros(outputs, columns), 0
    sums = [torch.zeros(size) for size in (columns, outputs, outputs, outputs)]
    origins = None
    for rows, wanted in samples:
        lacking = wanted - torch.addmm(layer.bias, rows, weight.T)
        origins = origins or (rows.mean(0), wanted.mean(0))
        rows, wanted = rows - origins[0], wanted - origins[1]
        inner.addmm_(rows.T, rows)
        cross.addmm_(lacking.T, rows)
        for total, part in zip(sums, (rows, lacking, wanted, wanted.square()), strict=True):
            total += part.sum(0)
        count += len(rows)
    mean, lacking, wanted, square = (total / count for total in sums)
    covariance = (inner / count).sub_(torch.outer(mean, mean))
    cross = cross / count - torch.outer(lacking, mean)
    variance = max(float((square - wanted.square()).sum()), 0.0)
    return covariance, origins[0] + mean, cross, lacking, variance


def _code_layer(
    layer: nn.Module,
    samples: Iterable[tuple[torch.Tensor, torch.Tensor]],
    price: float,
    fine: bool,
) -> CodedLayer:
    """Code one layer on samples, as :func:`_take_moments` takes them."""
    covariance, mean, cross, lacking, variance = _take_moments(layer, samples)
    if not (math.isfinite(variance) and covariance.isfinite().all()):
        raise UserError("activations beyond 65,504, the largest of FP16, cannot be coded")
    spread = float(covariance.diagonal().mean())
    spread = max(spread, SMALLEST_SPREAD * (1 + float(mean.square().mean())))
    weight = layer.weight.flatten(1)
    covariance.diagonal().add_(REPAIR_RIDGE * spread)
    wanted = weight + torch.cholesky_solve(cross.T, torch.linalg.cholesky(covariance)).T
    covariance.diagonal().add_((RIDGE - REPAIR_RIDGE) * spread)  # levels are chosen with less of it
    size = weight.numel()
    bit = price * 1e-6 * variance * (size / REFERENCE_SIZE) ** (SIZE_POWER - 1)
    finest = wanted.abs().amax(1).clamp(min=MAX_LEVEL * SMALLEST_STEP) / MAX_LEVEL
    if fine:
        bit, steps = 0.0, finest
    else:
        steps = torch.full_like(finest, max(math.sqrt(STEP_PRICES * bit / spread), finest.max()))
    steps = steps.half().float()  # as the file keeps them
    levels = choose_levels(wanted, covariance, steps, bit, layer.weight[0, 0].numel())
    bias = layer.bias + lacking + (weight - levels * steps[:, None]) @ mean
    return CodedLayer(levels.view_as(layer.weight), steps, bias.half().float())


def _some_outputs(layer: nn.Module, kept: torch.Tensor | slice, x: torch.Tensor) -> torch.Tensor:
    """Return those of a layer's outputs that are ``kept``."""
    return layer(x)[:, kept]


def _sum_of(block: BasicBlock, x: torch.Tensor) -> torch.Tensor:
    """Return what a folded block gives before its last ReLU."""
    return block.conv2(block.conv1(x).relu_()).add_(block.shortcut(x))


def _in_batches(
    function: Callable[..., torch.Tensor], *signals: torch.Tensor, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a function of all images (float16), computed in float32."""
    start = 0
    for batch in _batches(*signals):
        result = function(*batch)
        if into is None:
            into = torch.empty(len(signals[0]), *result.shape[1:], dtype=torch.float16)
        into[start : start + len(result)] = result
        start += len(result)
    return into


def _batches(*signals: torch.Tensor | None) -> Iterator[list[torch.Tensor | None]]:
    """Yield some images at a time, in float32; pixels as they are."""
    for start in range(0, len(signals[0]), BATCH_SIZE):
        parts = (s if s is None else s[start : start + BATCH_SIZE] for s in signals)
        yield [p.float() if p is not None and p.dtype == torch.float16 else p for p in parts]
