"""Slim networks of one dense network, for any share of its multiply-adds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from common.network.resnet import BLOCKS, ResNet18
from common.network.size import describe_layers
from pruning.channels.allocation import (
    CURVE_IMAGES,
    Curves,
    choose_widths,
    measure_curves,
    width_grid,
)
from pruning.channels.repair import Dense, measure_dense, repair
from pruning.channels.slimming import inner_macs


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

    def slim(self, share: float) -> ResNet18:
        """Return the network in which ``share`` of the multiply-adds is left, repaired."""
        costs = {name: {w: self.macs[name] * w for w in self.grid[name]} for name in BLOCKS}
        return repair(self._dense, choose_widths(self._curves, costs, self.inner_budget(share)))

    def inner_budget(self, share: float) -> float:
        """Return the multiply-adds that inner channels may take where ``share`` of all is left."""
        return share * self.total_macs - (self.total_macs - self._inner_macs(-1))

    @property
    def largest_removed(self) -> float:
        """The largest share of the multiply-adds that can go."""
        return (self._inner_macs(-1) - self._inner_macs(0)) / self.total_macs

    @functools.cached_property
    def grid(self) -> Mapping[str, list[int]]:
        """The widths that each block may get, itself the last."""
        widths = zip(BLOCKS, self.model.widths.inner, strict=True)
        return {name: width_grid(width) for name, width in widths}

    @property
    def total_macs(self) -> int:
        """Multiply-adds of the dense network."""
        return sum(self._layer_macs.values())

    @functools.cached_property
    def macs(self) -> Mapping[str, int]:
        """The multiply-adds that one inner channel of each block takes."""
        return inner_macs(self.model, self._layer_macs)

    def _inner_macs(self, index: int) -> int:
        return sum(self.macs[name] * self.grid[name][index] for name in BLOCKS)

    @functools.cached_property
    def _layer_macs(self) -> Mapping[str, int]:
        return {layer.name: layer.macs for layer in describe_layers(self.model)}

    @functools.cached_property
    def _dense(self) -> Dense:
        return measure_dense(self.model, self.images, self.grid, self.seed, self.dtype)

    @functools.cached_property
    def _curves(self) -> Curves:
        half = {name: grid[(len(grid) - 1) // 2] for name, grid in self.grid.items()}
        dense = self._dense
        return measure_curves(dense.network, dense.kept, half, self.images[:CURVE_IMAGES])
