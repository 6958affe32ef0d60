"""The network coded to a wanted size, as a file that was read back and measured.

Bits fall with the price about as a power of it, so each price follows from a line through the
logarithms of two codings before it: the two that lie around the target, or the last two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from common.command.cli import log
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import Paired, predict
from common.network.size import saved_size_bytes
from quantization.coding.encoder import coding_targets, encode
from quantization.files.artifact import load_int8
from quantization.files.int8_file import save_int8
from quantization.int8.conversion import convert_coded
from quantization.int8.network import Int8Network
from quantization.settings import Settings

# First price: the bundled network takes BITS at PRICE, and twice the bits at a quarter of it.
PRICE, BITS, EXPONENT = 0.0235, 0.605, -0.5
TOLERANCE = 0.05  # share of the bits asked for
MAX_CODINGS = 6  # each takes about a minute
LARGEST_STEP = 16.0  # ratio of two prices that follow one another
SMALLEST_EXPONENT = 0.05  # of the price; where bits depend less on it, no price reaches the target
MARGIN = 0.1  # share of the bracket that an interpolated price keeps from either end


class Coding(NamedTuple):
    """A network coded at a price."""

    price: float  # price of a bit, as :func:`quantization.coding.encoder.encode` takes it
    bits: float  # bits of the whole file for each weight
    network: Int8Network  # the coded network


def write_smallest(
    inputs: Inputs, images: ImageSet, fp32: torch.Tensor, settings: Settings, batch_size: int,
    bits_wanted: float, path: Path,
) -> dict:  # fmt: skip
    """Write a file of about ``bits_wanted`` for each weight; return results.json's ``coding``.

    It is coded on training ``images`` without labels; ``fp32`` are FP32's predictions (int64, (N,))
    on the test images.
    """
    dense, test = inputs.traced.network, inputs.test
    settings = replace(settings, fp32_layers=())
    weights = sum(dense.layers[name].weight.numel() for name in dense.graph.layers)

    targets = coding_targets(dense, images, inputs.seed)

    def code(price: float) -> Coding:
        layers = encode(dense, targets, price)
        network = convert_coded(dense, layers, inputs.calibration, settings, batch_size)
        return Coding(price, 8 * save_int8(network, path) / weights, network)

    file_bytes = save_int8(code_to_bits(code, bits_wanted).network, path)
    model = load_int8(path, settings.engine)
    correct = predict(model, test, batch_size, "evaluate coded") == test.labels
    ratio = saved_size_bytes(inputs.model.state_dict()) / file_bytes
    log.info("%s: %.1f times smaller than FP32", path.name, ratio)
    return {
        "images": len(images),
        "file": path.name,
        "bits_wanted": bits_wanted,
        "file_bytes": file_bytes,
        "size_ratio": ratio,
        "size_ratio_given": inputs.weights["size_bytes"] / file_bytes,
        "bits_per_weight": 8 * file_bytes / weights,
        **Paired.of(fp32 == test.labels, correct).as_dict(),
    }


def code_to_bits(code: Callable[[float], Coding], wanted: float) -> Coding:
    """Return the coding whose file is nearest to ``wanted`` bits a weight; warn where it misses."""
    codings: list[Coding] = []
    price: float | None = PRICE * (wanted / BITS) ** (1 / EXPONENT)
    while price is not None and len(codings) < MAX_CODINGS:
        codings.append(code(price))
        log.info("coding at a price of %.3g: %.3f bits a weight", price, codings[-1].bits)
        price = next_price(codings, wanted)
    nearest = min(codings, key=lambda coding: abs(math.log(coding.bits / wanted)))
    if misses(nearest.bits, wanted):
        log.warning(
            "--bits-per-weight: %g asked for, %.3g written: the nearest of %d networks coded",
            wanted, nearest.bits, len(codings),
        )  # fmt: skip
    return nearest


def misses(bits: float, wanted: float) -> bool:
    """Return whether a file's bits a weight are not those asked for."""
    return abs(bits / wanted - 1) > TOLERANCE


def next_price(codings: Sequence[Coding], wanted: float) -> float | None:
    """Return the price to code at next; None if the last coding is right or no price can be."""
    last = codings[-1]
    if not misses(last.bits, wanted):
        return None
    larger = min((c for c in codings if c.bits > wanted), key=lambda c: c.bits, default=None)
    smaller = max((c for c in codings if c.bits < wanted), key=lambda c: c.bits, default=None)
    if larger and smaller:
        share = math.log(larger.bits / wanted) / math.log(larger.bits / smaller.bits)
        share = min(max(share, MARGIN), 1 - MARGIN)
        return larger.price * (smaller.price / larger.price) ** share
    exponent = EXPONENT
    if len(codings) > 1:
        before = codings[-2]
        exponent = math.log(last.bits / before.bits) / math.log(last.price / before.price)
    if exponent > -SMALLEST_EXPONENT:
        return None
    step = (wanted / last.bits) ** (1 / exponent)
    return last.price * min(max(step, 1 / LARGEST_STEP), LARGEST_STEP)
