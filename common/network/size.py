"""How large a model is: bytes on disk, parameters, non-zeros, multiply-accumulates."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from common.files.untrusted import serialize
from common.network.execution import Network
from common.network.tracing import weight_layers


@dataclass(frozen=True)
class LayerDescription:
    """A convolution or linear layer, named as in the state dict."""

    name: str
    kind: str  # conv or linear
    shape: tuple[int, ...]  # shape of the weight
    weights: int  # number of weights; a bias is not counted
    nonzeros: int  # number of weights that are not zero
    macs: int  # multiply-accumulates an image, weights of zero included


def saved_size_bytes(state: Mapping[str, object]) -> int:
    """Return the bytes that ``torch.save`` of a state dict takes on disk."""
    return len(serialize(state))


def count_macs(network: Network) -> int:
    """Return the multiply-accumulates that an image takes, weights of zero included."""
    return sum(network.macs.values())


def describe_network(family: str, model: nn.Module, network: Network) -> dict:
    """Return results.json's ``network`` for a model and what it was traced to."""
    return {
        "family": family,
        "layers": len(network.graph.layers),
        "macs": count_macs(network),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def describe_layers(model: nn.Module, network: Network) -> list[LayerDescription]:
    """Describe every convolution and linear layer, in the order of the state dict.

    The weights are the model's, into which no batch norms are folded; ``network`` is its trace.
    """
    described = []
    for name, module in weight_layers(model, network).items():
        weight, kind = module.weight, "linear" if isinstance(module, nn.Linear) else "conv"
        counts = weight.numel(), int(weight.count_nonzero()), network.macs[name]
        described.append(LayerDescription(name, kind, tuple(weight.shape), *counts))
    return described
