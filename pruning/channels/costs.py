"""What networks of other widths cost, and the widths to choose for a share of it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.network.execution import Network
from pruning.channels.allocation import Curves, choose_widths, width_grid
from pruning.channels.groups import ChannelGroup, find_groups

# What a share is of: for speed the first, for size the second.
MACS, WEIGHTS = "macs", "weights"
SMALLEST_SHARE = 0.002  # groups that hold less of both units are left alone
BISECTIONS = 10

Widths = Mapping[str, int]


@dataclass(frozen=True)
class ChannelCosts:
    """What the channels of a network cost, in multiply-adds or in weights."""

    network: Network  # dense network

    def cost(self, widths: Widths, unit: str = MACS) -> int:
        """Return what a network of these widths costs; other groups have all their channels."""
        full = {name: group.width for name, group in self.groups.items()}
        return sum(
            cost * math.prod(widths.get(group, full[group]) for group in self._touching[layer])
            // math.prod(full[group] for group in self._touching[layer])
            for layer, cost in self._layer_costs(unit).items()
        )  # fmt: skip

    def least_share(self, unit: str = MACS) -> float:
        """Return the smallest share that can be left."""
        return self.cost(self.narrowest, unit) / self.cost({}, unit)

    @functools.cached_property
    def groups(self) -> Mapping[str, ChannelGroup]:
        """The groups of channels that are worth removing."""

        def share(group: ChannelGroup, unit: str) -> float:
            costs = self._layer_costs(unit)
            return sum(costs.get(name, 0) for name in set(group.touched)) / sum(costs.values())

        found = find_groups(self.network)
        shares = {name: max(share(g, MACS), share(g, WEIGHTS)) for name, g in found.items()}
        return {name: group for name, group in found.items() if shares[name] >= SMALLEST_SHARE}

    @functools.cached_property
    def grid(self) -> Mapping[str, list[int]]:
        """The widths that each group may get, its own the last."""
        return {name: width_grid(group.width) for name, group in self.groups.items()}

    @property
    def narrowest(self) -> Widths:
        """The least widths."""
        return {name: grid[0] for name, grid in self.grid.items()}

    @property
    def half(self) -> Widths:
        """Widths of about half of each group."""
        return {name: grid[(len(grid) - 1) // 2] for name, grid in self.grid.items()}

    @functools.cached_property
    def _touching(self) -> Mapping[str, list[str]]:
        """For each layer the groups that it grows with; twice one that it both reads and gives."""
        return {
            layer: [
                name
                for name, group in self.groups.items()
                for layers in ((*group.producers, *group.between), group.readers)
                if layer in layers
            ]
            for layer in self.network.graph.layers
        }

    def _layer_costs(self, unit: str) -> Mapping[str, int]:
        if unit == MACS:
            return self.network.macs
        layers = self.network.layers
        return {name: layers[name].weight.numel() for name in self.network.graph.layers}

    def choose(self, curves: Curves, share: float, unit: str) -> Widths:
        """Return the widths of least divergence whose cost is within a share.

        A layer between two groups costs the product of their widths, and the knapsack needs costs
        that add up. So they are taken as they are near some widths, first near half of all, then
        near those that were found, for as long as that finds better ones. If the narrowest network
        costs more, a ValueError is raised.
        """
        allowed = share * self.cost({}, unit)
        best = self.narrowest
        if self.cost(best, unit) > allowed * (1 + 1e-9):
            raise ValueError(f"no widths cost as little as {allowed:g}")

        def divergence(widths: Widths) -> float:
            return sum(curves[name][width] for name, width in widths.items())

        found = self._choose_near(self.half, curves, allowed, unit)
        while divergence(found) < divergence(best):
            best, found = found, self._choose_near(found, curves, allowed, unit)
        return best

    def _choose_near(self, near: Widths, curves: Curves, allowed: float, unit: str) -> Widths:
        """Return widths whose true cost is ``allowed``, chosen by what they cost near others."""
        costs = {
            name: {
                width: self.cost({**near, name: width}, unit) - self.cost({**near, name: 0}, unit)
                for width in grid
            }
            for name, grid in self.grid.items()
        }
        fixed = self.cost(near, unit) - sum(costs[name][width] for name, width in near.items())
        found = self.narrowest
        low = sum(costs[name][width] for name, width in found.items())
        middle = most = 2 * allowed - fixed
        for _ in range(BISECTIONS):
            if middle <= low:
                break
            widths = choose_widths(curves, costs, middle)
            if self.cost(widths, unit) <= allowed * (1 + 1e-9):
                low, found = middle, widths
            else:
                most = middle
            middle = (low + most) / 2
        return found
