"""The search for the price of a bit at which the coded file has a wanted size.

Bits fall with the price about as a power of it, so each price follows from a line through the
logarithms of two codings before it: the two that lie around the target, or the last two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.command.cli import log
from quantization.int8.network import Int8Network

# First price: the bundled network takes BITS at PRICE, and twice the bits at a quarter of it.
PRICE, BITS, EXPONENT = 0.0235, 0.605, -0.5
TOLERANCE = 0.05  # share of the bits asked for
MAX_CODINGS = 6  # each takes about a minute
LARGEST_STEP = 16.0  # ratio of two prices that follow one another
SMALLEST_EXPONENT = 0.05  # of the price; where bits depend less on it, no price reaches the target
MARGIN = 0.1  # share of the bracket that an interpolated price keeps from either end


@dataclass(frozen=True)
class Coding:
    """A network coded at a price.

    Attributes:
        price: Price of a bit, as :func:`quantization.coding.encoder.encode` takes it.
        bits: Bits of the whole file for each weight.
        network: The coded network.
    """

    price: float
    bits: float
    network: Int8Network


def code_to_bits(code: Callable[[float], Coding], wanted: float) -> Coding:
    """Code a network until its file takes ``wanted`` bits a weight; return the nearest coding.

    A target that is missed by more than ``TOLERANCE`` is warned of.

    Args:
        code: Codes the network at a price.
        wanted: Bits of the file for each weight.
    """
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
    step = math.log(wanted / last.bits) / exponent
    largest = math.log(LARGEST_STEP)
    return last.price * math.exp(min(max(step, -largest), largest))
