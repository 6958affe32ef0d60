"""From a PyTorch module to a graph: traced by torch.fx, its batch norms folded.

The module runs once on a blank image. This turns what depends on sizes, such as
``x.view(x.size(0), -1)``, into numbers, so that the graph holds operations on images alone.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from common.command.cli import UserError
from common.files.untrusted import explained
from common.network.execution import Network
from common.network.graph import ADD, Graph, Operation
from common.network.recording import Recorder


@dataclass(frozen=True)
class Traced:
    """A network, and how it belongs to the module that it was traced from."""

    network: Network  # its layers have the names of their modules; batch norms are folded
    norms: Mapping[str, str]  # names of the batch norms that were folded, by layer
    blocks: tuple[str, ...]  # modules that add or concatenate, such as residual blocks


def trace(model: nn.Module, image_shape: Sequence[int]) -> Traced:
    """Trace a module in eval mode, which is not changed, from images (N, *image_shape) to logits.

    Raises:
        UserError: An operation is none of the known kinds, or the module cannot be traced.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the module is in training mode")
    with explained("the network cannot be traced", ": its forward must not depend on values"):
        graph = _Tracer().trace(model, _options(model))
        recorder = Recorder(fx.GraphModule(model, graph), image_shape)
    first = next(model.parameters(), torch.empty(0))
    size = " × ".join(map(str, image_shape))
    with (
        explained(f"the network does not run on an image of {size}"),
        torch.no_grad(),
        ViewsAsReshapes(),
    ):
        recorder.record(torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device))
    operations, layers = recorder.operations, recorder.layers
    counts = {n: layer.weight.numel() for n, layer in layers.items() if operations[n].is_layer}
    if not counts:
        raise UserError("the network has no convolution and no linear layer")
    graph = in_execution_order(operations.values(), recorder.logits, counts)
    layers = {o.name: layers[o.name] for o in graph.operations if o.name in layers}
    norms = {name: norm for name, norm in recorder.norms.items() if name in graph}
    return Traced(Network(graph, layers), norms, tuple(recorder.blocks))


def trace_network(model: nn.Module, image_shape: Sequence[int]) -> Network:
    """Return the network of a module in eval mode; see :func:`trace`."""
    return trace(model, image_shape).network


def weight_layers(model: nn.Module, network: Network) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the modules of a network's layers by name, in the order of the state dict."""
    return {name: m for name, m in model.named_modules() if name in network.graph.layers}


def in_execution_order(
    operations: Iterable[Operation], output: str, weight_counts: Mapping[str, int]
) -> Graph:
    """Return the graph of the operations that lead to ``output``; they come in any valid order.

    The operand of an addition that the fewest weights lead to runs first. The coder relies on it:
    the last operand makes up for the errors of the others.
    """
    by_name = {operation.name: operation for operation in operations}
    layers: dict[str, frozenset[str]] = {}  # layers that lead to each operation
    for name, operation in by_name.items():
        own = {name} & weight_counts.keys()
        layers[name] = frozenset(own).union(*(layers[source] for source in operation.inputs))

    @functools.cache
    def weights_before(name: str) -> int:
        return sum(weight_counts[layer] for layer in layers[name])

    ordered: dict[str, Operation] = {}
    stack = [output]
    while stack:  # a recursion would be too deep for deep networks
        operation = by_name[stack[-1]]
        inputs = list(operation.inputs)
        if operation.kind == ADD:
            inputs.sort(key=weights_before)
        missing = next((name for name in inputs if name not in ordered), None)
        if missing is not None:
            stack.append(missing)
        else:
            ordered.setdefault(operation.name, operation)
            stack.pop()
    return Graph(tuple(ordered.values()))


def _options(model: nn.Module) -> dict[str, bool | None]:
    """Return the defaults of what ``forward`` may take beside the images, such as targets."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | None)}


class _Tracer(fx.Tracer):
    """Traces into all modules but torch's own with weights: the others are functions by name."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        has_weights = isinstance(module, _BatchNorm) or next(module.parameters(), None) is not None
        return has_weights and super().is_leaf_module(module, qualified_name)


class ViewsAsReshapes(TorchFunctionMode):
    """``view`` copies values that lie otherwise in memory, which it would refuse.

    Convolutions keep their input's layout, or take that of their weight; channels_last is faster.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        takes_sizes = not kwargs and not any(isinstance(value, torch.dtype) for value in args)
        if function is torch.Tensor.view and takes_sizes:
            function = torch.Tensor.reshape
        return function(*args, **(kwargs or {}))


def with_reshapes(network: nn.Module) -> nn.Module:
    """Let a network run on images in any layout, though it uses ``view``, as many do."""
    kind = type(network)
    if isinstance(network, torch.jit.ScriptModule):  # cannot be traced, which is told later
        return network

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        if any(isinstance(argument, fx.Proxy) for argument in args):  # traced
            return kind.forward(self, *args, **kwargs)
        with ViewsAsReshapes():
            return kind.forward(self, *args, **kwargs)

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network
