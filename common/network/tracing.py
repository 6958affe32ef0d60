"""From a PyTorch module to a graph: traced by torch.fx, its batch norms folded.

Running the module once on a blank image turns what depends on sizes, such as
``x.view(x.size(0), -1)``, into numbers, so that the graph holds operations on images alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from common.command.cli import UserError
from common.network.execution import Layer, Network
from common.network.graph import (
    ADAPTIVE_POOL,
    ADD,
    AFFINE,
    AVERAGE_POOL,
    CONCATENATE,
    CONVOLUTION,
    FLATTEN,
    GLOBAL_POOL,
    INPUT,
    KINDS,
    LINEAR,
    MAX_POOL,
    MULTIPLY,
    PAD,
    PERMUTE,
    RESHAPE,
    SLICE,
    Operation,
    in_execution_order,
)

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Traced:
    """A network, and how it belongs to the module that it was traced from.

    Attributes:
        network: Its layers bear the names of their modules; batch norms are folded.
        norms: For each layer whose batch norm was folded the name of that batch norm.
        blocks: The names of the modules, but for the whole, in whose forward values are added or
            concatenated; of a ResNet its residual blocks.
    """

    network: Network
    norms: Mapping[str, str]
    blocks: tuple[str, ...]


def trace(model: nn.Module, image_shape: Sequence[int]) -> Traced:
    """Trace a module in eval mode, which is not changed.

    Args:
        model: Maps normalised images (N, C, H, W) to logits; on any device.
        image_shape: Channels, height and width of an image.

    Raises:
        UserError: An operation is none of the known kinds, or the module cannot be traced.
    """
    tracer = _Tracer(model)
    try:
        fx_graph = tracer.trace(model)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own forward raises
        raise UserError(
            f"the network cannot be traced ({_first_line(error)}): its forward must not depend on "
            "values"
        ) from None
    run = _Recorder(fx.GraphModule(model, fx_graph), image_shape)
    first = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device)
    try:
        with torch.no_grad():
            run.record(image)
    except UserError:
        raise
    except Exception as error:
        size = " × ".join(map(str, image_shape))
        raise UserError(
            f"the network does not run on an image of {size} ({_first_line(error)})"
        ) from None
    return run.finish()


def trace_network(model: nn.Module, image_shape: Sequence[int]) -> Network:
    """Return the network of a module in eval mode; see :func:`trace`."""
    return trace(model, image_shape).network


def weight_layers(model: nn.Module, network: Network) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the modules of a network's layers by name, in the order of the state dict."""
    return {name: m for name, m in model.named_modules() if name in network.graph.layers}


class _Tracer(fx.Tracer):
    """Traces into all modules but torch's own and those that do nothing in eval mode."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if any(module.training for module in model.modules()):
            raise ValueError("the module is in training mode")

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return _is_nothing(module) or super().is_leaf_module(module, qualified_name)


def _is_nothing(module: nn.Module) -> bool:
    """Return whether a module does nothing in eval mode."""
    nothing = (nn.Identity, _DropoutNd)
    return isinstance(module, nothing) or type(module).__name__ in ("StochasticDepth", "DropPath")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class _Recorder(fx.Interpreter):
    """Runs a traced module once and notes each operation on the way."""

    def __init__(self, module: fx.GraphModule, image_shape: Sequence[int]):
        super().__init__(module, garbage_collect_values=False)
        self._shape = list(image_shape)
        self._operations: dict[str, Operation] = {}
        self._layers: dict[str, Layer] = {}
        self._norms: dict[str, str] = {}
        self._names: dict[fx.Node, str] = {}  # of the operation that gives a node's value
        self._parts: dict[fx.Node, list[tuple[str, list[list[int]]]]] = {}  # of a split
        self._blocks: dict[str, None] = {}
        self._output = ""
        self._module_names = {name for name, _ in module.named_modules()}

    def record(self, image: torch.Tensor) -> None:
        """Run all nodes; unlike ``run``, which extends error messages by several lines."""
        self.args_iter = iter((image,))
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)

    def finish(self) -> Traced:
        """Return what was noted."""
        counts = {
            name: layer.weight.numel()
            for name, layer in self._layers.items()
            if self._operations[name].is_layer
        }
        if not counts:
            raise UserError("the network has no convolution and no linear layer")
        graph = in_execution_order(self._operations.values(), self._output, counts)
        layers = {o.name: self._layers[o.name] for o in graph.operations if o.name in self._layers}
        norms = {n: b for n, b in self._norms.items() if n in graph}
        return Traced(Network(graph, layers), norms, tuple(self._blocks))

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        self._node, self._value = node, value
        if node.op == "placeholder":
            if self._operations:
                if node.args:  # an argument with a default, which nobody gives
                    return value
                raise UserError("the network takes more than one input")
            self._add(INPUT, [], shape=self._shape)
        elif node.op == "output":
            (result,) = node.args
            if result not in self._names:
                raise UserError("the network gives something else than one tensor of logits")
            if value.ndim != 2:
                raise UserError(f"the network gives {tuple(value.shape)} for an image, not logits")
            self._output = self._names[result]
        elif isinstance(value, torch.Tensor) or node in self._tuples(value):
            if node.op == "get_attr":
                return value  # a constant: refused where it is used
            self._note(node, value)
        return value

    def _tuples(self, value: object) -> tuple:
        is_split = isinstance(value, tuple | list) and value
        return (self._node,) if is_split and isinstance(value[0], torch.Tensor) else ()

    def _note(self, node: fx.Node, value: object) -> None:
        if node.op == "call_module":
            self._note_module(node, self.fetch_attr(node.target))
            return
        target = node.target if node.op == "call_method" else _function_name(node.target)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        noted = _FUNCTIONS.get(target)
        if noted is None or not noted(self, node, _Call(args, kwargs)):
            self._refuse(str(target))

    def _note_module(self, node: fx.Node, module: nn.Module) -> None:
        if _is_nothing(module):
            self._same(node.args[0])
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if node.target in self._operations:
                raise UserError(f"the layer {node.target} is used twice, which is not supported")
            if isinstance(module, nn.Conv2d):
                self._add(CONVOLUTION, [node.args[0]], **_convolution_attributes(node, module))
            else:
                self._add(LINEAR, [node.args[0]])
                if self._value.ndim != 2:
                    raise UserError(f"the linear layer {node.target} reads no vector an image")
            weight = module.weight.detach()
            bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
            self._layers[node.target] = _laid_out(weight, bias)
        elif isinstance(module, _BatchNorm):
            self._note_batch_norm(node, module)
        elif (found := _MODULES.get(type(module))) is not None:
            function, arguments = found
            _FUNCTIONS[function](self, node, _Call((None,), arguments(module)))
        else:
            self._refuse(type(module).__name__)

    def _note_batch_norm(self, node: fx.Node, norm: _BatchNorm) -> None:
        if norm.running_mean is None:
            raise UserError(f"the batch norm {node.target} has no running statistics")
        source = node.args[0]
        name = self._names[source]
        operation = self._operations[name]
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        if operation.is_layer and len(source.users) == 1 and name not in self._norms:
            layer = self._layers[name]
            is_convolution = operation.kind == CONVOLUTION
            fuse = fuse_conv_bn_weights if is_convolution else fuse_linear_bn_weights
            weight, bias = fuse(layer.weight, layer.bias, *statistics)
            self._layers[name] = _laid_out(weight.detach(), bias.detach())
            self._norms[name] = node.target
            self._same(source)
            return
        one = torch.ones_like(norm.running_mean)
        scale = (one if norm.weight is None else norm.weight) * (
            norm.running_var + norm.eps
        ).rsqrt()
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        added = self._add(AFFINE, [source])
        self._layers[added] = Layer(scale.detach(), shift.detach())

    def _add(self, kind: str, sources: Sequence[object], **attributes: object) -> str:
        """Note an operation, whose value is the current node's."""
        for source in sources:
            if source not in self._names:
                self._refuse(f"{kind} of something that is not computed from the image")
        node = self._node
        name = node.target if node.op == "call_module" else node.name
        taken = {*self._operations, *(() if node.op == "call_module" else self._module_names)}
        if name in taken:  # a module that is used again, or a function named as a module
            name = next(n for i in itertools.count(2) if (n := f"{name}_{i}") not in taken)
        if kind in (ADD, CONCATENATE) and (modules := node.meta.get("nn_module_stack")):
            self._blocks[list(modules)[-1]] = None
        inputs = tuple(self._names[source] for source in sources)
        self._operations[name] = Operation(name, kind, inputs, attributes)
        self._names[node] = name
        return name

    def _same(self, source: fx.Node) -> bool:
        """Note that the current node gives the value of another one."""
        if source not in self._names:
            self._refuse("an operation on something that is not computed from the image")
        self._names[self._node] = self._names[source]
        return True

    def _refuse(self, what: str) -> None:
        raise UserError(
            f"the network's {self._node.name} is {what}, which is not supported; known kinds: "
            f"{', '.join(KINDS[1:])}"
        )


def _laid_out(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Layer(weight, bias)


def _function_name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))


def _convolution_attributes(node: fx.Node, module: nn.Conv2d) -> Attributes:
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise UserError(f"the convolution {node.target} pads unequally, which is not supported")
        padding = [r // 2 for r in reach]
    if module.padding_mode != "zeros" and any(padding):
        raise UserError(f"the convolution {node.target} pads with {module.padding_mode}, not zeros")
    return {
        "stride": list(module.stride),
        "padding": list(padding),
        "dilation": list(module.dilation),
        "groups": module.groups,
    }


@dataclass(frozen=True)
class _Call:
    """The values that a function was called with; its first argument is not among the kwargs."""

    args: tuple
    kwargs: Mapping[str, object]

    def get(self, position: int, name: str, default: object) -> object:
        """Return an argument."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


# --- functions and methods: each notes its operation, and returns whether it could ----------------


def _source(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.kwargs["input"]


def _unary(kind: str) -> Callable[[_Recorder, fx.Node, _Call], bool]:
    def note(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
        return bool(recorder._add(kind, [_source(node)]))

    return note


def _binary(kind: str) -> Callable[[_Recorder, fx.Node, _Call], bool]:
    def note(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
        if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            return False
        return bool(recorder._add(kind, node.args))

    return note


def _nothing(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    return recorder._same(_source(node))


def _note_concatenate(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if call.get(1, "dim", 0) not in (1, 1 - recorder._value.ndim):
        return False
    return bool(recorder._add(CONCATENATE, list(parts)))


def _note_max_pool(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    kernel = _pair(call.get(1, "kernel_size", None))
    stride = call.get(2, "stride", None)
    recorder._add(
        MAX_POOL, [_source(node)], kernel=kernel, stride=_pair(stride) if stride else kernel,
        padding=_pair(call.get(3, "padding", 0)), dilation=_pair(call.get(4, "dilation", 1)),
        ceil=bool(call.get(5, "ceil_mode", False)),
    )  # fmt: skip
    return not call.get(6, "return_indices", False)


def _note_average_pool(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    source = _source(node)
    size = list(recorder.env[source].shape[2:])
    kernel, padding = _pair(call.get(1, "kernel_size", None)), _pair(call.get(3, "padding", 0))
    if kernel == size and not any(padding):
        return bool(recorder._add(GLOBAL_POOL, [source], keep=True))
    stride = call.get(2, "stride", None)
    recorder._add(
        AVERAGE_POOL, [source], kernel=kernel, stride=_pair(stride) if stride else kernel,
        padding=padding, ceil=bool(call.get(4, "ceil_mode", False)),
        count_padding=bool(call.get(5, "count_include_pad", True)),
    )  # fmt: skip
    return call.get(6, "divisor_override", None) is None


def _note_adaptive_pool(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    source = _source(node)
    size = recorder.env[source].shape[2:]
    wanted = [
        old if new is None else new
        for old, new in zip(size, _pair(call.get(1, "output_size", None)), strict=True)
    ]
    if wanted == list(size):
        return recorder._same(source)
    if wanted == [1, 1]:
        return bool(recorder._add(GLOBAL_POOL, [source], keep=True))
    if all(old % new == 0 for old, new in zip(size, wanted, strict=True)):
        kernel = [old // new for old, new in zip(size, wanted, strict=True)]
        return bool(
            recorder._add(
                AVERAGE_POOL, [source], kernel=kernel, stride=kernel, padding=[0, 0], ceil=False,
                count_padding=True,
            )
        )  # fmt: skip
    return bool(recorder._add(ADAPTIVE_POOL, [source], source_size=list(size), size=wanted))


def _note_mean(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    source, dims = _source(node), call.get(1, "dim", None)
    value = recorder.env[source]
    if value.ndim != 4 or not isinstance(dims, tuple | list):
        return False
    if sorted(d % 4 for d in dims) != [2, 3]:
        return False
    return bool(recorder._add(GLOBAL_POOL, [source], keep=bool(call.get(2, "keepdim", False))))


def _note_shape(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    """Note whatever keeps an image's numbers in their order: view, flatten, squeeze."""
    source = _source(node)
    old, new = recorder.env[source].shape, recorder._value.shape
    if len(new) == 0 or new[0] != old[0]:
        return False
    if new == old:
        return recorder._same(source)
    if len(new) == 2:
        return bool(recorder._add(FLATTEN, [source]))
    return bool(recorder._add(RESHAPE, [source], shape=list(new[1:])))


def _note_permute(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    dims = call.args[1] if len(call.args) == 2 else call.args[1:]
    dims = call.kwargs.get("dims", dims)
    order = [d % recorder._value.ndim for d in dims]
    return order[0] == 0 and bool(recorder._add(PERMUTE, [_source(node)], order=order))


def _note_transpose(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    order = list(range(recorder._value.ndim))
    first, second = call.get(1, "dim0", 0), call.get(2, "dim1", 0)
    order[first], order[second] = order[second], order[first]
    return order[0] == 0 and bool(recorder._add(PERMUTE, [_source(node)], order=order))


def _note_pad(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    padding = list(call.get(1, "pad", ()))
    is_zero = call.get(2, "mode", "constant") == "constant" and not call.get(3, "value", 0)
    if not is_zero or min(padding) < 0 or len(padding) > 6 or recorder._value.ndim != 4:
        return False
    return bool(recorder._add(PAD, [_source(node)], padding=padding))


def _note_split(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    source = _source(node)
    if source not in recorder._names:
        return False
    dimension = call.get(2, "dim", 0) % recorder.env[source].ndim
    start, parts = 0, []
    for part in recorder._value:
        stop = start + part.shape[dimension]
        parts.append((source, [[dimension, start, stop, 1]]))
        start = stop
    recorder._parts[node] = parts
    return dimension != 0


def _note_item(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    source, index = node.args
    if source in recorder._parts:
        part_of, parts = recorder._parts[source][call.args[1]]
        return bool(recorder._add(SLICE, [part_of], parts=parts))
    size = recorder.env[source].shape
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if Ellipsis in index or len(index) > len(size) or not all(isinstance(i, slice) for i in index):
        return False
    parts = [
        [dimension, *part.indices(size[dimension])]
        for dimension, part in enumerate(index)
        if part != slice(None)
    ]
    if any(dimension == 0 for dimension, *_ in parts):
        return False
    return bool(recorder._add(SLICE, [source], parts=parts)) if parts else recorder._same(source)


def _note_hardtanh(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    low, high = call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)
    return (low, high) == (0, 6) and bool(recorder._add("relu6", [_source(node)]))


def _note_clamp(recorder: _Recorder, node: fx.Node, call: _Call) -> bool:
    low, high = call.get(1, "min", None), call.get(2, "max", None)
    if low != 0 or high not in (None, 6):
        return False
    return bool(recorder._add("relu" if high is None else "relu6", [_source(node)]))


_FUNCTIONS: dict[str, Callable[[_Recorder, fx.Node, _Call], bool]] = {
    **dict.fromkeys(("add", "add_", "iadd"), _binary(ADD)),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), _binary(MULTIPLY)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _note_concatenate),
    **dict.fromkeys(("max_pool2d", "boolean_dispatch"), _note_max_pool),
    "avg_pool2d": _note_average_pool,
    "adaptive_avg_pool2d": _note_adaptive_pool,
    "mean": _note_mean,
    **dict.fromkeys(
        ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _note_shape
    ),
    "permute": _note_permute,
    "transpose": _note_transpose,
    "pad": _note_pad,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _note_split),
    "getitem": _note_item,
    **dict.fromkeys(("relu", "relu_"), _unary("relu")),
    "relu6": _unary("relu6"),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _note_hardtanh),
    **dict.fromkeys(("clamp", "clamp_", "clip"), _note_clamp),
    "hardswish": _unary("hardswish"),
    "hardsigmoid": _unary("hardsigmoid"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _unary("sigmoid")),
    "silu": _unary("silu"),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "dropout", "dropout2d", "stochastic_depth", "drop_path"),
        _nothing,
    ),
}

# For each module the function that it runs, and that function's arguments.
_MODULES: dict[type[nn.Module], tuple[str, Callable[[Any], Attributes]]] = {
    nn.ReLU: ("relu", lambda m: {}),
    nn.ReLU6: ("relu6", lambda m: {}),
    nn.Hardtanh: ("hardtanh", lambda m: {"min_val": m.min_val, "max_val": m.max_val}),
    nn.Hardswish: ("hardswish", lambda m: {}),
    nn.Hardsigmoid: ("hardsigmoid", lambda m: {}),
    nn.Sigmoid: ("sigmoid", lambda m: {}),
    nn.SiLU: ("silu", lambda m: {}),
    nn.MaxPool2d: ("max_pool2d", vars),
    nn.AvgPool2d: ("avg_pool2d", vars),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", vars),
    nn.Flatten: ("flatten", lambda m: {}),
    nn.Unflatten: ("unflatten", lambda m: {}),
    nn.ZeroPad2d: ("pad", lambda m: {"pad": m.padding}),
}
