"""Slim networks of one dense network, for any share of its multiply-adds or of its weights."""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.fitting.walk import mirrored_pairs
from common.images.data import ImageSet
from common.network.tracing import Traced
from common.search.trials import Range
from pruning.channels.allocation import CURVE_IMAGES, Curves, measure_curves
from pruning.channels.costs import MACS, WEIGHTS, ChannelCosts, Widths
from pruning.channels.repair import POSITIONS, Dense, measure_dense, repair
from pruning.channels.slimming import channels_given

# Share of the images that say what to keep of a group. The others measure what that costs: on the
# images that it was fitted to, a narrow layer looks better than it is.
FITTED_SHARE = 0.75
CONTEXT_SHARE = 0.5  # of the multiply-adds
WIDEST_SHARE = 0.97
SHARE_STEP = 1.02  # ratio of two shares whose best widths are compared
MEANS_RATIO = 3.0  # of the divergence on means of two images to that on images (docs/channels.md)
# Curves are measured without repair, which makes up for most of what they add up to: 0.045 nats for
# a ResNet18 that lost one point. A network that is a little too wide is the better first guess.
CURVE_NATS = 3.0
# Coded within one point, the bundled ResNet18 diverges by about 0.036 nats, and as the file shrinks
# the divergence grows with this power of it (docs/channels.md).
CODED_NATS, CODING_EXPONENT = 3.6, 1.6
STRIDE = 1.15  # the first guess is near, so the next one need not be far


@dataclass(frozen=True)
class Slimmer:
    """Removes channels; what it learns of the dense network, it learns once, when first asked."""

    model: nn.Module  # dense module, in eval mode; not changed
    traced: Traced  # its network
    # Training images, on the model's device; labels are not used. Their mirror images are used too,
    # as far as memory allows.
    images: ImageSet
    seed: int  # seed of the positions that are looked at
    dtype: torch.dtype  # precision to run in

    def widths(self, share: float, unit: str = MACS) -> Widths:
        """Return the best widths of the network in which ``share`` of the ``unit`` is left."""
        return self.costs.choose(self._curves_for(unit), share, unit)

    def slim(self, share: float, unit: str = MACS) -> nn.Module:
        """Return the network in which ``share`` of the ``unit`` is left, repaired."""
        return repair(self._dense, self.widths(share, unit))

    def search_range(self, unit: str, max_drop: float) -> Range:
        """Return where to look for how many times fewer of the ``unit`` a network may have.

        The first guess is the smallest share whose curves add up to ``CURVE_NATS`` times
        ``max_drop`` nats.
        """
        shares = self._divergences(unit)
        within = [share for share, lost in shares if lost <= CURVE_NATS * max_drop]
        return self._range_from(min(within, default=shares[0][0]), unit)

    def coding_range(self, max_drop: float) -> Range:
        """Return where to look for how many times fewer weights a network may have that is coded.

        One network is tried: that of the share where narrowing further costs more divergence than
        coding to the same size would.
        """
        nats = CODED_NATS * max_drop * CODING_EXPONENT
        shares = self._divergences(WEIGHTS)
        start, _ = min(shares, key=lambda found: found[1] + nats * math.log(found[0]))
        return replace(self._range_from(start, WEIGHTS), trials=1)

    def _range_from(self, share: float, unit: str) -> Range:
        """Return the range of all networks, which begins with that of a ``share`` of the unit."""
        most = 1 / self.costs.least_share(unit)
        return Range(1 / share, 1 / WIDEST_SHARE, most, stride=STRIDE)

    def _divergences(self, unit: str) -> list[tuple[float, float]]:
        """Return falling shares of the ``unit``, and what the best widths' curves add up to."""
        curves, found, least = self._curves_for(unit), [], self.costs.least_share(unit)
        share = max(WIDEST_SHARE, least)
        while share >= least:
            widths = self.widths(share, unit)
            lost = sum(curves[name][width] for name, width in widths.items())
            found.append((share, lost))
            share /= SHARE_STEP
        return found

    def channels_of(self, slim: nn.Module) -> dict[str, torch.Tensor]:
        """Return for each layer of such a network which channels of the dense one it has."""
        widths = {name: len(slim.get_submodule(name).weight) for name in self.costs.groups}
        choices = {name: self._dense.choices[name][width] for name, width in widths.items()}
        return channels_given(self.costs.groups, choices)

    @functools.cached_property
    def costs(self) -> ChannelCosts:
        """What the channels cost."""
        return ChannelCosts(self.traced.network)

    @functools.cached_property
    def _dense(self) -> Dense:
        groups, grid = self.costs.groups, self.costs.grid
        positions = POSITIONS * 2 * len(self.images) // len(self._pairs)
        return measure_dense(
            self.model, self.traced, groups, self._pairs, grid, self.seed, self.dtype,
            self._fitted, positions,
        )  # fmt: skip

    def _curves_for(self, unit: str) -> Curves:
        return self._curves if unit == MACS else self._weight_curves

    @functools.cached_property
    def _curves(self) -> Curves:
        """What each width costs, in a network of half of the multiply-adds."""
        return self._measure(self._context, self._unseen)

    @functools.cached_property
    def _weight_curves(self) -> Curves:
        """The same for weights, half of it measured on means of two images.

        These tell more of the last layers, which hold most weights and are sure of themselves on
        training images. They exaggerate what the first layers lose, which hold few.
        """
        pixels = self._unseen.images.int()
        means = ((pixels + pixels.roll(1, 0)) // 2).to(torch.uint8)
        on_means = self._measure(self._context, replace(self._unseen, images=means))
        return {
            name: {
                width: (lost + on_means[name][width] / MEANS_RATIO) / 2
                for width, lost in curve.items()
            }
            for name, curve in self._curves.items()
        }

    @functools.cached_property
    def _context(self) -> Widths:
        """Widths of a network of half of the multiply-adds."""
        share = max(CONTEXT_SHARE, self.costs.least_share())
        return self.costs.choose(self._measure(self.costs.half, self._unseen), share, MACS)

    def _measure(self, context: Widths, images: ImageSet) -> Curves:
        dense = self._dense
        return measure_curves(dense.network, dense.groups, dense.choices, context, images)

    @property
    def _unseen(self) -> ImageSet:
        """Images that did not say what to keep."""
        first = min(math.ceil(self._fitted / 2), len(self.images) - 1)  # of one image, that
        return self.images.rows(slice(first, first + CURVE_IMAGES))

    @property
    def _fitted(self) -> int:
        return math.ceil(FITTED_SHARE * len(self._pairs))

    @functools.cached_property
    def _pairs(self) -> ImageSet:
        """The images and their mirror images, or as many as fit in memory."""
        return mirrored_pairs(self.images, [self.traced.network], self.dtype.itemsize)
