"""Slim networks of one dense network, for any share of its multiply-adds or of its weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from common.network.resnet import BLOCKS, ResNet18
from common.network.size import LayerDescription, describe_layers
from common.network.tracing import trace_network
from pruning.channels.allocation import (
    CURVE_IMAGES,
    Curves,
    choose_widths,
    measure_curves,
    width_grid,
)
from pruning.channels.repair import Dense, measure_dense, repair

# What a share is of, as describe_layers calls it: for speed the first, for size the second.
MACS, WEIGHTS = "macs", "weights"
# Of the images, those that say what to keep of a block. The others measure what that costs: on the
# images that it was fitted to, a narrow block looks better than it is.
FITTED_SHARE = 0.75
CONTEXT_SHARE = 0.5  # of the multiply-adds


@dataclass(frozen=True)
class Slimmer:
    """Removes channels; what it learns of the dense network, it learns once, when first asked.

    Attributes:
        model: Dense, in eval mode; not changed.
        images: uint8 training images (N, 3, 32, 32), on the model's device.
        seed: Of the positions that are looked at.
        dtype: Precision to run in.
    """

    model: ResNet18
    images: torch.Tensor
    seed: int
    dtype: torch.dtype

    def slim(self, share: float, unit: str = MACS) -> ResNet18:
        """Return the network in which ``share`` of the ``unit`` is left, repaired."""
        return repair(self._dense, self._choose(self._curves, share, unit))

    def channels_of(self, slim: ResNet18) -> Mapping[str, torch.Tensor]:
        """Return which inner channels of each block such a network has of the dense one's."""
        widths = zip(BLOCKS, slim.widths.inner, strict=True)
        return {name: self._dense.kept[name][width].channels for name, width in widths}

    def inner_budget(self, share: float, unit: str = MACS) -> float:
        """Return what the inner channels may cost where ``share`` of all is left."""
        total = self._total(unit)
        return share * total - (total - self._inner_cost(-1, unit))

    def least_share(self, unit: str = MACS) -> float:
        """Return the smallest share that can be left."""
        going = self._inner_cost(-1, unit) - self._inner_cost(0, unit)
        return 1 - going / self._total(unit)

    @functools.cached_property
    def grid(self) -> Mapping[str, list[int]]:
        """The widths that each block may get, itself the last."""
        widths = zip(BLOCKS, self.model.widths.inner, strict=True)
        return {name: width_grid(width) for name, width in widths}

    def channel_costs(self, unit: str = MACS) -> Mapping[str, int]:
        """Return what one inner channel of each block costs."""
        costs = self._layer_costs(unit)
        return {
            name: (costs[f"{name}.conv1"] + costs[f"{name}.conv2"]) // width
            for name, width in zip(BLOCKS, self.model.widths.inner, strict=True)
        }

    def _inner_cost(self, index: int, unit: str) -> int:
        costs = self.channel_costs(unit)
        return sum(costs[name] * self.grid[name][index] for name in BLOCKS)

    def _total(self, unit: str) -> int:
        return sum(self._layer_costs(unit).values())

    def _layer_costs(self, unit: str) -> Mapping[str, int]:
        return {layer.name: getattr(layer, unit) for layer in self._layers}

    @functools.cached_property
    def _layers(self) -> Sequence[LayerDescription]:
        return describe_layers(self.model, trace_network(self.model, (3, 32, 32)))

    @functools.cached_property
    def _dense(self) -> Dense:
        return measure_dense(
            self.model, self.images, self.grid, self.seed, self.dtype, self._fitted
        )

    @functools.cached_property
    def _curves(self) -> Curves:
        """What each width costs, in a network of half of the multiply-adds."""
        half = {name: grid[(len(grid) - 1) // 2] for name, grid in self.grid.items()}
        share = max(CONTEXT_SHARE, self.least_share())
        context = self._choose(self._measure(half), share, MACS)
        return self._measure(context)

    def _measure(self, context: Mapping[str, int]) -> Curves:
        dense = self._dense
        unseen = self.images[min(self._fitted, len(self.images) - 1) :]  # of one image, that
        return measure_curves(dense.network, dense.kept, context, unseen[:CURVE_IMAGES])

    @property
    def _fitted(self) -> int:
        return math.ceil(FITTED_SHARE * len(self.images))

    def _choose(self, curves: Curves, share: float, unit: str) -> dict[str, int]:
        channel = self.channel_costs(unit)
        costs = {name: {w: channel[name] * w for w in self.grid[name]} for name in BLOCKS}
        return choose_widths(curves, costs, self.inner_budget(share, unit))
