"""How many of the multiply-adds can go by removing whole channels, within the tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from common.command.cli import UserError
from common.network.resnet import BLOCKS, ResNet18
from common.report.results import percent
from pruning.channels.slimmer import Slimmer
from pruning.channels.slimming import slim_by_norm
from pruning.together.allocation import NORM
from pruning.together.recalibration import recalibrate_batch_norm
from pruning.together.search import Method, ModelSearch, SparsityStep
from quantization.int8.engines import fastest_engine

SCOPE = "channels"
# Channels chosen and made up for on training images, with widths measured in context.
RECONSTRUCTED = "reconstructed"
CALIBRATION_IMAGES = 1000
# Shares of the multiply-adds are searched in steps of 1/32.
LEVELS = 32
COARSE_LEVELS = (24, 20, 16, 12, 8)


def require_possible(model: ResNet18, macs_removed: float | None) -> None:
    """Check, before any long work, that so much can go and that INT8 can be timed.

    Args:
        model: Dense.
        macs_removed: Share of the multiply-adds that is to go; None for what a search finds.

    Raises:
        UserError: It cannot.
    """
    fastest_engine()
    most = 1 - Slimmer(model, torch.empty(0), 0, torch.float32).least_share()
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
    _slim: dict[tuple[Method, float], ResNet18] = field(default_factory=dict)

    def __post_init__(self):
        dtype = torch.bfloat16 if self.fast else torch.float32
        self.slimmer = Slimmer(self.model, self.calibration.images, self.seed, dtype)
        self.highest = int(LEVELS * (1 - self.slimmer.least_share()))
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
        """Return the methods to search with, the control last."""
        return [Method(RECONSTRUCTED, False), Method(NORM, True)]

    def norm_widths(self, sparsity: float) -> dict[str, int]:
        """Return widths for the control: the same share of every block."""
        macs, grid = self.slimmer.channel_costs(), self.slimmer.grid
        share = self.slimmer.inner_budget(1 - sparsity)
        share /= sum(macs[name] * grid[name][-1] for name in BLOCKS)
        return {name: max(1, int(share * grid[name][-1])) for name in BLOCKS}

    def prune(self, method: Method, sparsity: float) -> ResNet18:
        """Return a slim network without this share of the multiply-adds."""
        if sparsity == 0:
            return self.model
        if (method, sparsity) not in self._slim:
            if method.allocation == NORM:
                slim = slim_by_norm(self.model, self.norm_widths(sparsity))
                recalibrate_batch_norm(slim, self.calibration)
            else:
                slim = self.slimmer.slim(1 - sparsity)
            self._slim[method, sparsity] = slim
        return self._slim[method, sparsity]

    def find_largest(self, method: Method) -> tuple[float, list[SparsityStep]]:
        """Return the largest share within the tolerance, and the steps that led to it."""
        if not self.is_given:
            return super().find_largest(method)
        return self.macs_removed, [
            self.judge(self.prune(method, self.macs_removed), self.macs_removed)
        ]
