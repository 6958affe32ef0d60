"""The sensitivity scan: every layer pruned alone, its correctness image by image."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from common.command import cli
from common.files.unfinished import SCRIPT
from common.images.data import ImageSet, checksum
from common.machine.workers import ALONE, Workers
from common.network.cascade import Fp32Recheck
from common.network.execution import Network
from common.network.tracing import trace_network, weight_layers
from pruning.alone.head import Head


@dataclass(frozen=True)
class Scan:
    """What to scan, and how."""

    model: nn.Module  # network in eval mode, on the images' device; not changed
    images: ImageSet  # images to measure on
    layers: Sequence[str]  # names of the layers to prune, each alone
    amounts: Sequence[float]  # fractions to prune
    batch_size: int  # images in a batch; batches of 16 keep a CPU's variants in its L3 cache
    fast: bool  # run the variants in bf16 and the close cases again in FP32
    workers: Workers = ALONE  # processes that scan together, each a share of every chunk

    @functools.cached_property
    def network(self) -> Network:
        """The model as a graph."""
        return trace_network(self.model, self.images.shape)

    @functools.cached_property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of all layers, in the order of the state dict."""
        layers = weight_layers(self.model, self.network)
        return {name: module.weight.detach() for name, module in layers.items()}

    @functools.cached_property
    def head(self) -> Head | None:
        """The linear layers at the end of the network; None where there are none."""
        return Head.of(self.network, self.weights)

    def identity(self) -> dict:
        """Return what the results depend on, named for the user."""
        return {
            SCRIPT: "pruning",
            "the checkpoint": checksum(self.model.state_dict().values()),
            "the test images": checksum([self.images.images, self.images.labels]),
            "the layers": list(self.layers),
            "the amounts": list(self.amounts),
            "torch": torch.__version__,
            "the number of threads": torch.get_num_threads(),
            "the batch size": self.batch_size,
            "the precision (--precision)": "bf16 and FP32" if self.fast else "FP32",
            "the device": self.images.images.device.type,
            "the number of processes": self.workers.count,
        }


@dataclass(frozen=True)
class ScanResult:
    """Result of the scan, image by image in the order of the dataset, on the CPU."""

    dense_correct: torch.Tensor  # correctness of the dense network, bool, shape (N,)
    # Input of the head's linear layers, FP32, shape (N, features); without columns where there are
    # none.
    features: torch.Tensor
    # For each amount and layer, the correctness, bool, shape (N,).
    correct: dict[tuple[float, str], torch.Tensor]
    achieved: dict[tuple[float, str], float]  # for each amount and layer, the fraction of zeros
    recheck: Fp32Recheck | None  # counts of what FP32 checked; None where everything ran in FP32


def choose_layers(
    names: Sequence[str], patterns: Sequence[str] | None, own_names: Mapping[str, str]
) -> list[str]:
    """Return the layers that match any pattern (``layer4.*``), in their order.

    Patterns are of names here or, by ``own_names``, in the checkpoint; None stands for all layers.
    A pattern that matches nothing is a UserError.
    """
    if patterns is None:
        return list(names)

    def matches(name: str, pattern: str) -> bool:
        return any(fnmatchcase(n, pattern) for n in (name, own_names.get(name, name)))

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise cli.UserError(f"--layers {pattern}: matches none of {', '.join(names)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
