"""Observers: they see a value on every calibration batch and choose the range that INT8 keeps.

The range always contains 0, so that zeros, such as those of padding, are exact.
"""

import bisect
import math

import numpy as np
import torch

from common.command.cli import UserError
from quantization.int8.network import MAX_LEVEL, ValueRange

REDUCED_MAX_LEVEL = 127
SMALLEST_SCALE = torch.finfo(torch.float32).eps
BINS = 2048  # of a histogram
UPSAMPLING = 16  # parts that a bin is divided into when a histogram gets a wider range
SEARCH_STEP = 1e-5  # fraction of the values that one step of the search leaves out
LEVELS = MAX_LEVEL + 1
CLIPPED_FRACTION = 1e-4  # that the percentile observer leaves out at each end
AVERAGING = 0.01  # weight of a new batch in the moving average


class MinMaxObserver:
    """Keeps all values between the least and the greatest that were seen, ``low`` and ``high``."""

    def __init__(self):
        self.low, self.high = math.inf, -math.inf

    def observe(self, values: torch.Tensor) -> None:
        """See the values of a batch: float32, any shape; a UserError if some are not finite."""
        low, high = (float(limit) for limit in torch.aminmax(values))
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError("the network gives NaN or infinite values on calibration images")
        self._update(values, low, high)

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def limits(self) -> tuple[float, float]:
        """Return the least and the greatest value to keep."""
        return self.low, self.high

    def choose_range(self, reduce_range: bool) -> ValueRange:
        """Return how to store the values; ``reduce_range`` leaves the upper 128 levels free."""
        low, high = (np.float32(limit) for limit in self.limits())
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        levels = REDUCED_MAX_LEVEL if reduce_range else MAX_LEVEL
        scale = max((high - low) / np.float32(levels), np.float32(SMALLEST_SCALE))
        zero_point = min(max(-int(np.rint(low / scale)), 0), levels)
        return ValueRange(float(scale), zero_point)


class MovingAverageObserver(MinMaxObserver):
    """Keeps the range between the moving averages of the batches' least and greatest values."""

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        if self.low > self.high:
            self.low, self.high = low, high
        else:
            self.low += AVERAGING * (low - self.low)
            self.high += AVERAGING * (high - self.high)


class HistogramObserver(MinMaxObserver):
    """Keeps the range in which the expected squared error of rounding and clipping is least."""

    def __init__(self):
        super().__init__()
        self._counts = torch.zeros(BINS)

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        before = self.low, self.high
        super()._update(values, low, high)
        after = self.low, self.high
        if before[0] <= before[1] and before != after:
            self._counts = _widen(self._counts, before, after)
        self._counts = torch.histc(values, BINS, *after) + self._counts

    def limits(self) -> tuple[float, float]:
        """Return the least and the greatest value to keep."""
        if self.low == self.high:
            return self.low, self.high
        start, end = _search_bins(self._counts, (self.high - self.low) / BINS)
        low, high = np.float32(self.low), np.float32(self.high)
        width = (high - low) / np.float32(BINS)
        return float(low + width * np.float32(start)), float(low + width * np.float32(end + 1))


class PercentileObserver(HistogramObserver):
    """Keeps the values between two percentiles of all that was seen."""

    def limits(self) -> tuple[float, float]:
        """Return the least and the greatest value to keep."""
        shares = self._counts.cumsum(0) / self._counts.sum()
        edges = torch.linspace(self.low, self.high, BINS + 1)
        low = edges[int((shares <= CLIPPED_FRACTION).sum())]
        high = edges[int((shares < 1 - CLIPPED_FRACTION).sum()) + 1]
        return float(low), float(high)


OBSERVERS: dict[str, type[MinMaxObserver]] = {
    "histogram": HistogramObserver,
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "percentile": PercentileObserver,
}


def _widen(
    counts: torch.Tensor, before: tuple[float, float], after: tuple[float, float]
) -> torch.Tensor:
    """Return a histogram over ``before`` as one over the wider range ``after``."""
    if before[0] == before[1]:
        return torch.histc(torch.tensor(before[:1]), BINS, *after) * counts.sum()
    parts = counts.repeat_interleave(UPSAMPLING) / UPSAMPLING
    low, high = torch.tensor(before)
    middles = torch.linspace(*before, len(parts) + 1)[:-1] + 0.5 * ((high - low) / len(parts))
    edges = torch.linspace(*after, BINS + 1)
    bins = torch.bucketize(middles, edges, right=True).sub_(1).clamp_(0, BINS - 1)
    return torch.bincount(bins, weights=parts, minlength=BINS)


def _search_bins(counts: torch.Tensor, width: float) -> tuple[int, int]:
    """Return the first and the last bin of the range with the least squared error.

    Each step leaves a little more out, at the end where that empties more bins, until the error
    grows. This is Caffe2's search, in FP32 arithmetic as there: the error is so flat that rounding
    decides where it ends. ``counts`` are the values in each bin, ``width`` is that of a bin.
    """
    cumulative, total = counts.cumsum(0).tolist(), float(counts.sum())
    start, end, least = 0, BINS - 1, math.inf
    below, above = 0.0, 1.0  # fractions of the values; those between are kept
    while below < above:
        tried_below, tried_above = below + SEARCH_STEP, above - SEARCH_STEP
        low = bisect.bisect_left(cumulative, float(np.float32(tried_below * total)))
        high = bisect.bisect_right(cumulative, float(np.float32(tried_above * total))) - 1
        low, high = max(start, min(low, end)), min(end, max(high, start))
        if low - start > end - high:
            below, tried = tried_below, (low, end)
        else:
            above, tried = tried_above, (start, high)
        if tried == (start, end):
            continue
        error = _squared_error(counts, width, *tried)
        if error > least:
            break
        least, (start, end) = error, tried
    return start, end


def _squared_error(counts: torch.Tensor, width: float, start: int, end: int) -> float:
    """Return the squared error of storing values, spread evenly over bins, in a range of bins."""
    step = width * (end - start + 1) / LEVELS
    if step == 0:
        return 0.0
    begins = (torch.arange(BINS) - start) * width
    ends = begins + width
    first, last = (
        torch.div(x, step, rounding_mode="floor").clamp_(0, LEVELS - 1) for x in (begins, ends)
    )
    density, half = counts / width, torch.tensor(step / 2)

    def integral(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Integrate the squared distance to a level."""
        return density * ((high * high * high - low * low * low) / 3)

    error = integral(begins - (first + 0.5) * step, half)
    error += (last - first - 1) * integral(-half, half)  # levels between
    error += integral(-half, ends - (last * step + step / 2))
    return float(error.sum())
