"""Small integers in few bits: a range coder that expects what the neighbours suggest.

Most weights of a coded network are zero, and where the others lie is no accident: some channels
have many, and beside one in a 3×3 kernel there is likely another, of the same sign. So each weight
is coded as flags (zero or not, its sign, how many bits, which), each with the probability that its
context has. Contexts are made of what was coded before, which the reader knows too; their
probabilities, a byte each, lead the stream.

constriction (https://bamler-lab.github.io/constriction) codes many flags of one probability at
once. So weights are coded in batches, a position of the kernel and a part of the input channels
each, whose weights are no context of one another; and a batch context by context. Contexts are
computed in integers alone: the reader may run on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import constriction
import numpy as np

CHANNEL_PARTS = 4
ACTIVITIES = 32  # contexts of whether a weight is zero
GROUPS = 4  # of activities, for the flags that follow
BITS = 8  # of a level's magnitude, at most
LEAN = 4  # how far neighbours' signs can point one way
# Where the contexts begin: of zeros, of signs, of the number of bits, of these bits.
SIGNS = ACTIVITIES
LENGTHS = SIGNS + 2 * LEAN + 1
LOWER_BITS = LENGTHS + GROUPS * BITS
CONTEXTS = LOWER_BITS + BITS
# What makes a weight likely not to be zero, in the order in which it is weighed: a signed byte each
# in the stream.
EVIDENCE = ("its output channel", "its input channel", "its kernel", "anything")
UNIT = 32  # of these bytes
ACTIVITY_NATS = 0.25  # of the odds, from one context of zeros to the next
SURVEYED = 100_000  # weights that the evidence is weighed on
NEWTON_STEPS = 8
ADJACENT, APART = 3, 1  # how much a neighbour in the kernel says
OCTAVE = 8  # steps of a logarithm
OCTAVES = 40  # more than a channel can have weights
# A byte is a step on the scale of odds, from 2^-12 to 2^12; probabilities are rounded to 16 bits.
PROBABILITIES = [round(65536 / (1 + 2 ** ((128 - step) * 12 / 128))) / 65536 for step in range(256)]


def _least_with_log(steps: int) -> int:
    """Return the least n with floor(8 log2 n) = ``steps``, or more where none has as many."""
    n = max(1, int(2 ** (steps / OCTAVE)) - 1)
    while n**OCTAVE < 1 << steps:
        n += 1
    return n


LEAST_WITH_LOG = np.array([_least_with_log(k) for k in range(OCTAVES * OCTAVE)], np.int64)

# Of the evidence and of which weights are not zero: each weight's context (int64, flat).
Activity = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
# Of a context and its flags, which in reading say nothing yet: the flags (bool).
Flags = Callable[[int, np.ndarray], np.ndarray]


def encode(layers: Sequence[np.ndarray]) -> bytes:
    """Return the levels of some layers as a stream.

    Args:
        layers: int8, each (outputs, inputs, positions of the kernel).
    """
    heads, encoder = [], constriction.stream.queue.RangeEncoder()

    def write(models: Sequence[object], context: int, flags: np.ndarray) -> np.ndarray:
        encoder.encode(flags.astype(np.int32), models[context])
        return flags

    for levels in layers:
        weights = _weigh_evidence(levels)
        table = _cheapest_table(levels, weights)
        _code(levels.copy(), partial(_activity, weights), partial(write, _models(table)))
        heads += [weights.view(np.uint8), table]
    words = encoder.get_compressed().astype("<u4")
    return np.concatenate([*heads, words.view(np.uint8)]).tobytes()


def decode(stream: bytes, shapes: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
    """Return the levels that :func:`encode` was given; memory is bounded by the shapes.

    Args:
        stream: May come from anywhere.
        shapes: Of the layers.

    Raises:
        ValueError: The stream does not hold such layers.
    """
    head = len(shapes) * (len(EVIDENCE) + CONTEXTS)
    if len(stream) < head or (len(stream) - head) % 4:
        raise ValueError("the coded levels are cut off")
    heads = np.frombuffer(stream, np.uint8, head).reshape(len(shapes), -1)
    words = np.frombuffer(stream, "<u4", offset=head).astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    layers = [np.zeros(shape, np.int8) for shape in shapes]

    def read(models: Sequence[object], context: int, flags: np.ndarray) -> np.ndarray:
        return decoder.decode(models[context], len(flags)).astype(bool)

    try:
        for levels, row in zip(layers, heads, strict=True):
            weights, table = row[: len(EVIDENCE)].view(np.int8), row[len(EVIDENCE) :]
            _code(levels, partial(_activity, weights), partial(read, _models(table)))
    except AssertionError:  # constriction's word for a stream that no encoder wrote
        raise ValueError("the coded levels are damaged") from None
    if not decoder.maybe_exhausted():
        raise ValueError("there are more coded levels than the network has")
    return layers


def _weigh_evidence(levels: np.ndarray) -> np.ndarray:
    """Return what each kind of evidence counts for in a layer (int8)."""
    rows = []

    def note(evidence: Sequence[np.ndarray], nonzero: np.ndarray) -> np.ndarray:
        parts = [np.broadcast_to(part, nonzero.shape) for part in (*evidence, nonzero)]
        every = -(-nonzero.size * 9 * CHANNEL_PARTS // SURVEYED)  # so many batches, or fewer
        rows.append(np.stack([part.reshape(-1)[::every] for part in parts], axis=1))
        return np.zeros(nonzero.size, np.int64)

    _code(levels.copy(), note, lambda context, flags: flags)
    noted = np.concatenate(rows)
    weights = fit_logistic(noted[:, :-1], noted[:, -1])
    return np.clip(np.round(weights * (UNIT / ACTIVITY_NATS)), -127, 127).astype(np.int8)


def _activity(
    weights: np.ndarray, evidence: Sequence[np.ndarray], nonzero: np.ndarray
) -> np.ndarray:
    """Return each weight's context of whether it is zero (int64, flat), by weighed evidence."""
    weighed = [int(w) * part for w, part in zip(weights, evidence, strict=True)]
    score = (sum(weighed[1:], weighed[0]) // UNIT).reshape(-1)
    return np.clip(score + ACTIVITIES // 2, 0, ACTIVITIES - 1)


def _cheapest_table(levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the step of each context's probability that costs least (uint8, (CONTEXTS,))."""
    counts = np.zeros((CONTEXTS, 2), np.int64)

    def count(context: int, flags: np.ndarray) -> np.ndarray:
        ones = int(np.count_nonzero(flags))
        counts[context] += (len(flags) - ones, ones)
        return flags

    _code(levels.copy(), partial(_activity, weights), count)
    ones = np.array(PROBABILITIES)
    return (counts @ -np.stack([np.log2(1 - ones), np.log2(ones)])).argmin(axis=1).astype(np.uint8)


def _models(table: np.ndarray) -> list[object]:
    """Return each context's model for the coder."""
    bernoulli = constriction.stream.model.Bernoulli
    return [bernoulli(PROBABILITIES[step], perfect=False) for step in table]


def fit_logistic(evidence: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Return the weights of a logistic regression, by Newton's method.

    Args:
        evidence: Shape (samples, parts).
        outcome: Whether it came so, shape (samples,).
    """
    x, weights = evidence.astype(np.float64), np.zeros(evidence.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -20, 20)))
        curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
        weights += np.linalg.solve(curvature, x.T @ (outcome - p) - weights)
    return weights


def _code(levels: np.ndarray, activity: Activity, code: Flags) -> None:
    """Run a layer's levels (outputs, inputs, positions) past a coder, which may fill them in."""
    outputs, inputs, positions = levels.shape
    order, width = _order(positions), -(-inputs // CHANNEL_PARTS)
    near = neighbours(positions)
    in_row, coded_in_row = np.zeros(outputs, np.int64), 0
    for start in range(0, inputs, width):
        part = levels[:, start : start + width].transpose(2, 0, 1)  # a view
        in_column, coded_in_column = np.zeros(part.shape[2], np.int64), 0
        beside, lean = np.zeros(part.shape, np.int16), np.zeros(part.shape, np.int16)
        for done, position in enumerate(order, start=1):
            rows, columns = _density(in_row, coded_in_row), _density(in_column, coded_in_column)
            evidence = (rows[:, None], columns, _log2(2 * beside[position] + 1), np.int64(UNIT))
            values = _code_batch(part[position], evidence, lean[position], activity, code)
            part[position] = values
            sign = np.sign(values)
            size = np.minimum(np.abs(values.astype(np.int16)), 2)
            for later in order[done:]:
                beside[later] += size * near[position, later]
                lean[later] += sign * near[position, later]
            in_row += np.count_nonzero(values, axis=1)
            in_column += np.count_nonzero(values, axis=0)
            coded_in_row, coded_in_column = (
                coded_in_row + values.shape[1],
                coded_in_column + outputs,
            )


def _order(positions: int) -> Sequence[int]:
    """Return the order of a kernel's positions: a 3×3 one's centre first, its corners last."""
    return (4, 1, 3, 5, 7, 0, 2, 6, 8) if positions == 9 else range(positions)


def neighbours(positions: int) -> np.ndarray:
    """Return how much each position of a kernel says of each other (int16)."""
    side = 3 if positions == 9 else positions
    y, x = np.divmod(np.arange(positions), side)
    away = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    near = np.where((away == 1) & (positions == 9), ADJACENT, APART) * (away > 0)
    return near.astype(np.int16)


def _density(nonzero: np.ndarray, coded: int) -> np.ndarray:
    """Return the logarithm, in steps, of the share of weights that are not zero in each channel."""
    return _log2(2 * nonzero + 2) - _log2(2 * coded + 16)  # an eighth, while nothing is known


def _log2(numbers: np.ndarray | int) -> np.ndarray:
    """Return floor(8 log2 n), exactly, of numbers of at least 1 (int64)."""
    return np.searchsorted(LEAST_WITH_LOG, numbers, side="right") - 1


def _code_batch(
    values: np.ndarray, evidence: tuple, lean: np.ndarray, activity: Activity, code: Flags
) -> np.ndarray:
    """Code weights (outputs, inputs) that are no context of one another; return their levels."""
    shape, given = values.shape, values.reshape(-1).astype(np.int16)  # the magnitude of -128 too
    contexts = activity(evidence, values != 0)
    magnitude = _flags(code, contexts, given != 0).astype(np.int16)
    (kept,) = magnitude.nonzero()
    signs = np.clip(lean.reshape(-1)[kept], -LEAN, LEAN) + (SIGNS + LEAN)
    negative = _flags(code, signs, given[kept] < 0)
    group = LENGTHS + contexts[kept].astype(np.int64) * GROUPS // ACTIVITIES * BITS
    magnitude[kept] = _code_magnitudes(np.abs(given[kept]), group, code)
    magnitude[kept] = np.where(negative, -magnitude[kept], magnitude[kept])
    return magnitude.astype(np.int8).reshape(shape)


def _code_magnitudes(given: np.ndarray, group: np.ndarray, code: Flags) -> np.ndarray:
    """Code magnitudes of at least 1: how many bits each has, then its bits after the first."""
    lengths = np.ones(len(given), np.int64)
    open_ = np.arange(len(given))  # those that may have more bits
    for length in range(1, BITS):
        more = _flags(code, group[open_] + length - 1, given[open_] >> length > 0)
        open_ = open_[more]
        lengths[open_] += 1
    magnitudes = np.ones(len(given), np.int64)
    for bit in range(1, BITS):  # the first after the leading one, and so on
        (longer,) = (lengths > bit).nonzero()
        shift = lengths[longer] - 1 - bit
        bits = _flags(code, np.full(len(longer), LOWER_BITS + bit), given[longer] >> shift & 1 > 0)
        magnitudes[longer] = magnitudes[longer] << 1 | bits
    return magnitudes


def _flags(code: Flags, contexts: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Code flags (bool) context by context; return them."""
    order = np.argsort(contexts.astype(np.uint8), kind="stable")  # in linear time
    counts = np.bincount(contexts, minlength=CONTEXTS)
    coded, start = np.empty(len(flags), bool), 0
    for context in counts.nonzero()[0]:
        members = order[start : start + counts[context]]
        coded[members] = code(context, flags[members])
        start += counts[context]
    return coded
