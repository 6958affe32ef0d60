"""The encoder of INT8 weights; :mod:`runtime.decode` decodes them and describes the format."""

from collections.abc import Sequence

import constriction
import numpy as np

from runtime import decode

MAX_FREQUENCY = 65_535  # frequency of a dense layer's commonest level; the table holds uint16
MIN_DENSE_WEIGHTS = 1 << 16  # a smaller layer does not pay for its table
MAX_ZEROS = 0.5  # fraction above which the neighbours say enough
ACTIVITY_NATS = 0.25  # change of the log odds from one context of zeros to the next
SURVEYED = 100_000  # weights that the evidence is weighed on
NEWTON_STEPS = 8


def choose_storage(levels: np.ndarray) -> str:
    """Return how a layer's levels are coded best: ``dense`` or ``sparse``.

    Where few weights are zero, one symbol for each takes 1 % more bytes, and a tenth of the time.
    """
    nonzero = np.count_nonzero(levels)
    is_dense = levels.size >= MIN_DENSE_WEIGHTS and nonzero >= (1 - MAX_ZEROS) * levels.size
    return "dense" if is_dense else "sparse"


def encode(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Return the levels of layers as a stream (uint8) for :func:`runtime.decode.decode_levels`.

    Layers are int8, (outputs, inputs per group, positions of the kernel).
    """
    tables, encoder = [], constriction.stream.queue.RangeEncoder()
    for levels in layers:
        is_dense = choose_storage(levels) == "dense"
        tables.append((_encode_dense if is_dense else _encode_sparse)(levels, encoder))
    return np.concatenate([*tables, encoder.get_compressed().astype("<u4").view(np.uint8)])


def _encode_dense(levels: np.ndarray, encoder: object) -> np.ndarray:
    """Encode a layer; return its table."""
    symbols = levels.reshape(-1).astype(np.int32) - decode.LOWEST
    counts = np.bincount(symbols, minlength=decode.LEVELS)
    table = -(-counts * MAX_FREQUENCY // counts.max())  # rounded up: none becomes zero
    encoder.encode(symbols, decode.dense_model(table))
    return table.astype("<u2").view(np.uint8)


def _encode_sparse(levels: np.ndarray, encoder: object) -> np.ndarray:
    """Encode a layer; return its table."""
    weights = _weigh_evidence(levels)
    table = _cheapest_table(levels, weights)
    probabilities = decode.PROBABILITIES[table]

    def write(contexts: np.ndarray, flags: np.ndarray) -> np.ndarray:
        encoder.encode(flags.astype(np.int32), decode.BERNOULLI, probabilities[contexts])
        return flags

    decode.code_layer(levels.copy(), decode.weigher(weights), write)
    return np.concatenate([weights.view(np.uint8), table])


def _weigh_evidence(levels: np.ndarray) -> np.ndarray:
    """Return the weight of each kind of evidence in a layer (int8)."""
    rows = []

    def note(evidence: Sequence[np.ndarray], nonzero: np.ndarray) -> np.ndarray:
        parts = [np.broadcast_to(part, nonzero.shape) for part in (*evidence, nonzero)]
        every = -(-nonzero.size * 9 * decode.CHANNEL_PARTS // SURVEYED)  # so many batches, or fewer
        rows.append(np.stack([part.reshape(-1)[::every] for part in parts], axis=1))
        return np.zeros(nonzero.size, np.int64)

    decode.code_layer(levels.copy(), note, lambda contexts, flags: flags)
    noted = np.concatenate(rows)
    weights = fit_logistic(noted[:, :-1], noted[:, -1])
    return np.clip(np.round(weights * (decode.UNIT / ACTIVITY_NATS)), -127, 127).astype(np.int8)


def _cheapest_table(levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the step of each context's probability that costs least (uint8, (CONTEXTS,))."""
    counts = np.zeros((2, decode.CONTEXTS), np.int64)

    def count(contexts: np.ndarray, flags: np.ndarray) -> np.ndarray:
        for flag in (0, 1):
            counts[flag] += np.bincount(contexts[flags == flag], minlength=decode.CONTEXTS)
        return flags

    decode.code_layer(levels.copy(), decode.weigher(weights), count)
    bits = -np.stack([np.log2(1 - decode.PROBABILITIES), np.log2(decode.PROBABILITIES)])
    return (counts.T @ bits).argmin(axis=1).astype(np.uint8)


def fit_logistic(evidence: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Fit outcomes (0 or 1, (n,)) to evidence (n, parts) by Newton's method; return the weights."""
    x, weights = evidence.astype(np.float64), np.zeros(evidence.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -20, 20)))
        curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
        weights += np.linalg.solve(curvature, x.T @ (outcome - p) - weights)
    return weights
