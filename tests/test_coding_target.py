"""The search for the price of a bit: a file of the bits asked for, or a warning that it is not."""

from __future__ import annotations

import logging

import pytest

from quantization.coding.smallest import MAX_CODINGS, TOLERANCE, Coding, code_to_bits


class Coder:
    """Codes nothing; the bits follow from the price, between what a file takes at least and most.

    With rising prices they fall as a power of the price, other than the one that the search
    expects, to the bytes that every file has.
    """

    def __init__(self, exponent: float, least: float = 0.02, most: float = 6.4):
        self.exponent, self.least, self.most, self.prices = exponent, least, most, []

    def __call__(self, price: float) -> Coding:
        self.prices.append(price)
        wanted = 0.3 * price**self.exponent
        return Coding(price, self.least + 1 / (1 / wanted + 1 / self.most), None)


@pytest.mark.parametrize("wanted", [0.1, 0.64, 3.0])
@pytest.mark.parametrize("exponent", [-0.15, -0.3, -0.5, -0.9])
def test_a_target_within_reach_is_reached(wanted, exponent, caplog):
    coder = Coder(exponent)
    found = code_to_bits(coder, wanted)
    assert abs(found.bits / wanted - 1) <= TOLERANCE
    assert found.price == coder.prices[-1]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("coder", "wanted", "written"),
    [(Coder(-0.5), 8.0, "6."), (Coder(-0.5, least=0.18), 0.1, "0.1"), (Coder(0.0), 2.0, "0.30")],
)
def test_a_target_out_of_reach_is_warned_of(coder, wanted, written, caplog):
    found = code_to_bits(coder, wanted)
    assert len(coder.prices) <= MAX_CODINGS
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    message = record.getMessage()
    assert f"{wanted:g} asked for, {found.bits:.3g} written" in message
    assert f"the nearest of {len(coder.prices)} networks" in message
    assert f"{found.bits:.3g}".startswith(written)


def test_the_nearest_is_returned_where_codings_run_out():
    bits = iter([1.2, 0.8, 1.11, 0.9, 1.07, 1.08])  # no line tells where
    prices = []

    def code(price: float) -> Coding:
        prices.append(price)
        return Coding(price, next(bits), None)

    assert code_to_bits(code, 1.0).bits == 1.07
    assert len(prices) == MAX_CODINGS
