"""How many of the multiply-adds can go by removing whole channels, within the tolerance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from common.command.cli import UserError
from common.network.execution import Network
from common.network.tracing import trace
from common.report.results import percent
from common.search.trials import Range, Trial
from pruning.channels.costs import MACS, ChannelCosts
from pruning.channels.slimmer import Slimmer
from pruning.together.search import Method, ModelSearch
from quantization.int8.engines import fastest_engine

SCOPE = "channels"
# Channels chosen and made up for on training images, with widths measured in context.
RECONSTRUCTED = "reconstructed"
CALIBRATION_IMAGES = 1000
# Shares of the multiply-adds to remove; what that costs is measured at each.
CURVE = (0.25, 0.375, 0.5, 0.625, 0.75)


def require_possible(network: Network, macs_removed: float | None) -> None:
    """Raise a UserError, before any long work, unless so much can go and INT8 can be timed."""
    fastest_engine()
    most = most_removed(ChannelCosts(network))
    if macs_removed is not None and macs_removed > most:
        raise UserError(f"--remove-macs: of this network {percent(most)} can go at most")


def most_removed(costs: ChannelCosts) -> float:
    """Return the largest share of the multiply-adds that can go, rounded down as it is printed."""
    return math.floor(1e4 * (1 - costs.least_share())) / 1e4


@dataclass
class ChannelSearch(ModelSearch):
    """The search over one checkpoint; ``sparsity`` is the share of multiply-adds that are gone."""

    unit = "multiply-adds"

    macs_removed: float | None = None  # look at this share only; None to search
    _slim: dict[float, nn.Module] = field(default_factory=dict)

    def __post_init__(self):
        dtype = torch.bfloat16 if self.fast else torch.float32
        traced = trace(self.model, self.held_out.images.shape)
        self.slimmer = Slimmer(self.model, traced, self.calibration, self.seed, dtype)
        most = most_removed(self.slimmer.costs)
        if self.is_given:
            self.curve = (self.macs_removed,)
        else:
            self.curve = tuple(share for share in CURVE if share <= most) or (most,)

    @property
    def where(self) -> Range:
        """Where to look for how many times fewer multiply-adds the network may have."""
        return self.slimmer.search_range(MACS, self.budget.max_drop)

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
            self._slim[sparsity] = self.slimmer.slim(1 - sparsity)
        return self._slim[sparsity]

    def kept_channels(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """Return which output channels are left of the layers of a slim network."""
        return self.slimmer.channels_of(model)

    def find_largest(self, method: Method) -> tuple[float, list[Trial]]:
        """Return the share that was asked for, or the largest one within the budget."""
        if not self.is_given:
            return super().find_largest(method)
        verdict = self.judge(self.prune(method, self.macs_removed))
        return self.macs_removed, [Trial(1 / (1 - self.macs_removed), verdict)]
