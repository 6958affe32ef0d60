"""The linear layers at the end of a network, and which images stay correct as they are pruned.

Their input is the same however much of them is pruned. With that input kept for every image, an
amount costs a few small matrix products. For a single layer, going from one pruned weight to the
next changes one logit of each image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.command import cli
from common.network.execution import Network
from common.network.graph import LINEAR
from pruning.masks import l1_mask_series, l1_masks, masked_layers, pruned_count

# Amounts to try: every number of weights, where a single layer has at most this many; else a
# thousand of a single layer, and whole percents of several.
MOST_WEIGHTS = 65_536
AMOUNTS_OF_ONE, AMOUNTS_OF_SEVERAL = 1000, 100


@dataclass(frozen=True)
class Head:
    """The linear layers at the end of a network, which are pruned together."""

    network: Network  # dense network, on the CPU
    features: str  # operation whose value, one vector an image, is all that they need
    # Weights of the layers in execution order, without batch norms: by their magnitudes the layers
    # are pruned.
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, network: Network, weights: Mapping[str, torch.Tensor]) -> "Head | None":
        """Find the linear layers that the logits depend on through one vector an image, if any."""
        graph, found = network.graph, None
        linear = [name for name in graph.layers if graph[name].kind == LINEAR]
        for first in reversed(range(len(linear))):
            inside = graph.affected_by(linear[first:])
            read = {name for inner in inside for name in graph[inner].inputs} - inside
            if len(read) != 1 or len(network.shapes[features := read.pop()]) != 1:
                break
            own = {name: weights[name].cpu() for name in linear[first:]}
            layers = {name: layer.to("cpu") for name, layer in network.layers.items()}
            found = cls(network.with_layers(layers), features, own)
        return found

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def is_single(self) -> bool:
        """Whether the head is one layer that gives the logits, without a batch norm."""
        name = self.network.graph.output
        return list(self.weights) == [name] and torch.equal(
            self.weights[name], self.network.layers[name].weight
        )

    @property
    def levels(self) -> int:
        """The number of amounts to try: level k prunes k of ``levels`` parts of every layer."""
        if not self.is_single:
            return AMOUNTS_OF_SEVERAL
        return self.total if self.total <= MOST_WEIGHTS else AMOUNTS_OF_ONE

    def counts_at(self, level: int) -> dict[str, int]:
        """Return how many weights of each layer are pruned at a level."""
        amount = level / self.levels
        return {name: pruned_count(w.numel(), amount) for name, w in self.weights.items()}

    def masks_at(self, level: int) -> dict[str, torch.Tensor]:
        """Return the masks of the weights that are kept at a level."""
        return l1_masks(self.weights, level / self.levels)

    def classify(self, network: Network, features: torch.Tensor) -> torch.Tensor:
        """Return the classes (N,) that a network of other weights finds from the head's input."""
        output = network.graph.output
        return network.run({self.features: features}, [output])[output].argmax(dim=1)

    def sweep(self, features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """Find the correct images at every level: bool, shape (levels + 1, N).

        ``features``, the input of the head, is FP32, (N, features); ``labels`` is int64, (N,).
        """
        if self.is_single and self.levels == self.total:
            layer = self.network.layers[self.network.graph.output]
            return sweep_single(features, labels, layer.weight, layer.bias)
        correct = np.empty((self.levels + 1, len(labels)), dtype=bool)
        levels = range(self.levels + 1)
        counts = [self.counts_at(level) for level in levels]
        series = {
            name: l1_mask_series(weight, [count[name] for count in counts])
            for name, weight in self.weights.items()
        }
        for level in cli.progress(levels, "linear layers", unit="amount"):
            kept = {name: next(masks) for name, masks in series.items()}
            pruned = self.network.with_layers(masked_layers(self.network, kept))
            correct[level] = (self.classify(pruned, features) == labels).numpy()
        return correct


def sweep_single(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> np.ndarray:
    """Find the correct images for every number of pruned weights of one linear layer.

    Row k of the result (bool, (number of weights + 1, N)) is with the k smallest weights pruned.
    Each step subtracts one weight's share from one class's logits. It is FP64, so that thousands of
    steps add up to less than the rounding of one FP32 product.
    """
    values = weight.double().numpy()
    columns = np.ascontiguousarray(features.double().numpy().T)
    logits = values @ columns + bias.double().numpy()[:, None]
    correct = np.empty((weight.numel() + 1, len(labels)), dtype=bool)
    kept = np.ones(values.shape, dtype=bool)
    counts = range(weight.numel() + 1)
    for count, mask in zip(counts, l1_mask_series(weight, counts), strict=True):
        mask = mask.numpy()
        # One weight, except among equal magnitudes, where torch may exchange some.
        for row, column in np.argwhere(mask != kept):
            sign = 1.0 if mask[row, column] else -1.0
            logits[row] += sign * values[row, column] * columns[column]
        kept = mask
        np.equal(logits.argmax(axis=0), labels.numpy(), out=correct[count])
    return correct
