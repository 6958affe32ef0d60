"""The levels of one layer: for each weight the one that costs least in output error and bits.

Let E be the errors of the weights (outputs, inputs) and H the second moment of the layer's inputs.
The error of its outputs is tr(E H Eᵀ) = |E R|², where R is upper triangular and R Rᵀ = H: a sum
over the columns, in which each depends on the columns before it only. So columns are coded from
first to last, each towards weights that compensate for the errors so far, as in OPTQ (Frantar et
al., 2022, arXiv:2210.17323). Each weight becomes the level with the least sum of squared error and
λ times its bits, as in CERWU (Conzel et al., 2025, arXiv:2505.18758).

The bits of a level are estimated from the levels of the pass before, by the contexts of
:mod:`runtime.decode`: how many weights of its channels are not zero, and its neighbours in the
kernel.
"""

import math

import numpy as np
import torch

from common.command.cli import UserError
from common.files.entropy import fit_logistic
from common.fitting.regression import Moments, with_ridge
from common.network.execution import Layer
from runtime.decode import neighbours

MAX_LEVEL = 127
BLOCK = 128  # columns between two updates of all that follow
PASSES = 2
FIRST_THRESHOLD = 0.6  # weights below so many steps are zero at first
FITTED = 100_000  # weights that the bits are estimated on
LN2 = np.float32(np.log(2))
RIDGE = 0.01  # share of the mean variance of a layer's inputs
REPAIR_RIDGE = 0.2  # the same for the regression, which would otherwise fit the images at hand
SMALLEST_SPREAD = 1e-3  # inputs after a layer of zeros vary by rounding only
SMALLEST_STEP = 2.0**-14  # smallest normal FP16 number
STEP_PRICES = 60.0  # square of a step, in prices of a bit
TOO_LARGE = "activations beyond 65,504, the largest of FP16, cannot be coded"


def fit_and_choose(
    layer: Layer, moments: Moments, price: float, kernel: int, steps: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a layer's levels, int8, (O, columns), its steps (O,) and its bias.

    The ``price`` of a bit is a share of the outputs' variance, 0 for 8 bits a weight; ``steps`` are
    given if other inputs of the layer were coded before.
    """
    spread = _spread(moments)
    wanted = moments.refit(layer, repair_ridge(moments)).weight
    bit = price * moments.variance
    if steps is None:
        steps = wanted.abs().amax(1).clamp(min=MAX_LEVEL * SMALLEST_STEP) / MAX_LEVEL
        if bit > 0:  # coarser, and the same for all outputs of a group
            finest = steps.unflatten(0, (len(spread), -1))
            coarse = (STEP_PRICES * bit / spread).sqrt().maximum(finest.amax(1))
            steps = coarse.repeat_interleave(finest.shape[1])
        steps = steps.half().float()  # as the file keeps them
    damped = with_ridge(moments.covariance, RIDGE * spread)
    levels = choose_levels(wanted, damped, steps, bit, kernel)
    return levels, steps, moments.best_bias(layer, levels * steps[:, None])


def repair_ridge(moments: Moments) -> torch.Tensor:
    """Return the ridge (groups,) of the regression that repairs what earlier layers lost."""
    return REPAIR_RIDGE * _spread(moments)


def _spread(moments: Moments) -> torch.Tensor:
    """Return the mean variance of each group's inputs, (groups,), if they are finite."""
    if not (math.isfinite(moments.variance) and moments.covariance.isfinite().all()):
        raise UserError(TOO_LARGE)
    spread = moments.covariance.diagonal(dim1=1, dim2=2).mean(1)
    return spread.maximum(SMALLEST_SPREAD * (1 + moments.mean.square().mean(1)))


def choose_levels(
    weight: torch.Tensor, moment: torch.Tensor, steps: torch.Tensor, price: float, positions: int
) -> torch.Tensor:
    """Return the levels (int8) of a float32 weight (outputs, columns), of its shape.

    A column is an input channel and one of the ``positions`` of the kernel. ``moment`` is the
    second moment of the inputs of each group of outputs, positive definite, (groups, columns,
    columns). ``steps`` are those of each output's levels, float32, (outputs,). The ``price`` is the
    squared error that a bit may cost.
    """
    # Upper triangular: the Cholesky factor of H with its columns in reverse, turned back.
    factor = torch.linalg.cholesky(moment.flip(1, 2)).flip(1, 2)
    scale = factor.diagonal(dim1=1, dim2=2).clone()
    feedback = (factor / scale[:, None]).numpy()
    target = (weight / steps[:, None]).T.contiguous().numpy()
    scale = scale.T.repeat_interleave(len(weight) // len(moment), dim=1)  # (columns, outputs)
    stiffness = (scale * steps).square().numpy()
    levels = np.rint(target).clip(-MAX_LEVEL, MAX_LEVEL) * (np.abs(target) > FIRST_THRESHOLD)
    for _ in range(PASSES):
        levels = _code_columns(_Estimate(levels, positions), target, feedback, stiffness, price)
    return torch.from_numpy(levels.T.astype(np.int8))


def _code_columns(
    estimate: "_Estimate", target: np.ndarray, feedback: np.ndarray, stiffness: np.ndarray,
    price: float,
) -> np.ndarray:  # fmt: skip
    """Code all columns again; return the levels, (columns, outputs).

    The ``target`` are the weights in steps, (columns, outputs). The ``feedback`` is what an error
    in a column adds to those after it, (groups, columns, columns); the ``stiffness`` the squared
    error of a step that these cannot compensate for, (columns, outputs).
    """
    groups, columns = feedback.shape[:2]
    grouped = target.reshape(columns, groups, -1).transpose(1, 0, 2)
    lost = np.zeros(grouped.shape, target.dtype)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        aims = feedback[:, :start, block].transpose(0, 2, 1) @ lost[:, :start]
        aims += grouped[:, block]
        inner = np.ascontiguousarray(feedback[:, block, block].transpose(0, 2, 1))
        for i, column in enumerate(range(block.start, block.stop)):
            near = inner[:, i, None, :i] @ lost[:, block][:, :i]
            aim = (aims[:, i] + near[:, 0]).reshape(-1)
            levels = estimate.round(column, aim, stiffness[column], price)
            lost[:, column] = grouped[:, column] - levels.reshape(groups, -1)
    return estimate.levels


class _Estimate:
    """Levels, and the bits of each given all others."""

    def __init__(self, levels: np.ndarray, positions: int):
        self.levels = levels.astype(np.float32)
        self._positions = positions
        self._near = neighbours(positions).astype(np.float32)
        self._signs, self._sizes = np.sign(self.levels), np.minimum(np.abs(self.levels), 2)
        self._fit()

    def _fit(self) -> None:
        """Fit the odds of a weight's flags to the present levels."""
        shape = (-1, self._positions, self.levels.shape[1])
        kept = (self._signs != 0).reshape(shape)
        rows, columns = (np.log2(kept.mean(axes) + 1e-3) for axes in ((0, 1), (1, 2)))
        beside = _log_beside(self._near @ self._sizes.reshape(shape))
        parts = (rows, columns[:, None, None], beside, np.ones(1))
        every = slice(None, None, -(-kept.size // FITTED))
        evidence = [np.broadcast_to(part, kept.shape).reshape(-1)[every] for part in parts]
        weights = fit_logistic(np.stack(evidence, axis=1), kept.reshape(-1)[every])
        self._row_odds = (weights[0] * rows + weights[3]).astype(np.float32)
        self._column_odds = (weights[1] * columns).astype(np.float32)
        self._beside = np.float32(weights[2])
        lean = (self._near @ self._signs.reshape(shape))[kept][:FITTED, None]
        self._lean = np.float32(
            fit_logistic(lean, self._signs.reshape(shape)[kept][:FITTED] > 0)[0]
        )
        magnitudes = np.abs(self.levels[self._signs != 0]).astype(np.int64)
        counts = np.bincount(magnitudes, minlength=MAX_LEVEL + 1) + 0.5
        counts[0] = counts.sum()  # so that a magnitude of none takes no bits
        self._magnitudes = -np.log2(counts / counts[0]).astype(np.float32)

    def round(
        self, column: int, aim: np.ndarray, stiffness: np.ndarray, price: float
    ) -> np.ndarray:
        """Return a column's levels, the cheapest of zero and the two nearest to ``aim`` (in steps).

        All arrays have the shape (outputs,).
        """
        kernel, position = divmod(column, self._positions)
        others = slice(kernel * self._positions, (kernel + 1) * self._positions)
        near = self._near[position]
        odds = self._row_odds + self._column_odds[kernel]
        odds += self._beside * _log_beside(near @ self._sizes[others])
        lean = self._lean * (near @ self._signs[others])
        zero, negative = np.logaddexp(0, odds) / LN2, np.logaddexp(0, lean) / LN2  # bits
        nonzero, positive = zero - odds / LN2, negative - lean / LN2

        size = np.abs(aim)
        low = np.minimum(size.astype(np.int64), MAX_LEVEL - 1)
        left = size - low
        low_cost = left * left * stiffness + price * self._magnitudes[low]
        high_cost = (1 - left) ** 2 * stiffness + price * self._magnitudes[low + 1]
        signs = np.where(aim < 0, negative, positive)
        kept_cost = np.minimum(low_cost, high_cost) + price * (nonzero + signs)
        zero_cost = size * size * stiffness + price * zero
        best = np.where(high_cost < low_cost, low + 1, low) * (kept_cost < zero_cost)
        levels = np.copysign(best, aim)

        self.levels[column], self._signs[column] = levels, np.sign(levels)
        self._sizes[column] = np.minimum(np.abs(levels), 2)
        return levels


def _log_beside(weight: np.ndarray) -> np.ndarray:
    """Return the logarithm of the neighbours' weight, as the coder uses it."""
    return np.log2(2 * weight + 1)
