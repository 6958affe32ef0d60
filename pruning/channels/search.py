"""How many of the multiply-adds can go by removing whole channels, within the tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from common.command.cli import UserError
from common.network.execution import Network
from common.network.tracing import trace
from common.report.results import percent
from pruning.channels.costs import ChannelCosts
from pruning.channels.slimmer import Slimmer
from pruning.together.search import Method, ModelSearch, SparsityStep
from quantization.int8.engines import fastest_engine

SCOPE = "channels"
# Channels chosen and made up for on training images, with widths measured in context.
RECONSTRUCTED = "reconstructed"
CALIBRATION_IMAGES = 1000
# Shares of the multiply-adds are searched in steps of 1/32.
LEVELS = 32
COARSE_LEVELS = (24, 20, 16, 12, 8)


def require_possible(network: Network, macs_removed: float | None) -> None:
    """Check, before any long work, that so much can go and that INT8 can be timed.

    Args:
        network: Dense network.
        macs_removed: Share of the multiply-adds that is to go; None for what a search finds.

    Raises:
        UserError: It cannot.
    """
    fastest_engine()
    most = 1 - ChannelCosts(network).least_share()
    if macs_removed is not None and macs_removed > most:
        told = percent(math.floor(1e4 * most) / 1e4)  # which is taken, too
        raise UserError(f"--remove-macs: of this network {told} can go at most")


@dataclass
class ChannelSearch(ModelSearch):
    """The search over one checkpoint; ``sparsity`` is the share of multiply-adds that are gone.

    Attributes:
        macs_removed: Look at this share only; None to search.
    """

    unit, levels = "multiply-adds", LEVELS

    macs_removed: float | None = None
    _slim: dict[float, nn.Module] = field(default_factory=dict)

    def __post_init__(self):
        dtype = torch.bfloat16 if self.fast else torch.float32
        traced = trace(self.model, self.chosen.images.shape)
        self.slimmer = Slimmer(self.model, traced, self.calibration, self.seed, dtype)
        self.highest = int(LEVELS * (1 - self.slimmer.costs.least_share()))
        self.coarse = [level for level in COARSE_LEVELS if level <= self.highest] or [self.highest]

    @property
    def curve(self) -> list[float]:
        """The shares to measure every method at."""
        return [self.macs_removed] if self.is_given else super().curve

    @property
    def is_given(self) -> bool:
        """Whether the share is asked for, whatever it costs."""
        return self.macs_removed is not None

    def methods(self) -> list[Method]:
        """Return the methods to search with."""
        return [Method(RECONSTRUCTED, False)]

    def prune(self, method: Method, sparsity: float) -> nn.Module:
        """Return a slim network without this share of the multiply-adds."""
        if sparsity == 0:
            return self.model
        if sparsity not in self._slim:
            self._slim[sparsity] = self.slimmer.slim(1 - sparsity).model
        return self._slim[sparsity]

    def find_largest(self, method: Method) -> tuple[float, list[SparsityStep]]:
        """Return the largest share within the tolerance, and the steps that led to it."""
        if not self.is_given:
            return super().find_largest(method)
        return self.macs_removed, [
            self.judge(self.prune(method, self.macs_removed), self.macs_removed)
        ]
