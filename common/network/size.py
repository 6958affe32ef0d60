"""How large a model is: bytes on disk, parameters, non-zeros, multiply-accumulates."""

from collections.abc import Mapping

from torch import nn

from common.files.untrusted import serialize
from common.network.execution import Network
from common.network.tracing import weight_layers


def saved_size_bytes(state: Mapping[str, object]) -> int:
    """Return the bytes that ``torch.save`` of a state dict takes on disk."""
    return len(serialize(state))


def describe_network(family: str, model: nn.Module, network: Network) -> dict:
    """Return results.json's ``network`` for a model and what it was traced to."""
    return {
        "family": family,
        "layers": len(network.graph.layers),
        "macs": sum(network.macs.values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def describe_layers(model: nn.Module, network: Network) -> list[dict]:
    """Return results.json's ``layers``, with the model's own weights; ``network`` is its trace."""
    return [
        {
            "name": name,
            "kind": "linear" if isinstance(module, nn.Linear) else "conv",
            "shape": list(module.weight.shape),
            "weights": module.weight.numel(),
            "nonzeros": int(module.weight.count_nonzero()),
            "macs": network.macs[name],
        }
        for name, module in weight_layers(model, network).items()
    ]
