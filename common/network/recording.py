"""The operations of a traced module, noted while it runs once on a blank image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from common.command.cli import UserError
from common.network import graph as kinds
from common.network.execution import Layer
from common.network.graph import Operation


class Recorder(fx.Interpreter):
    """Runs a traced module and notes the operation of each node.

    Attributes:
        operations: Operations by name, in the order of the module's forward.
        layers: Weights of the operations that have any.
        norms: For each layer whose batch norm was folded the name of that batch norm.
        blocks: Names of the modules in whose forward values are added or concatenated.
        logits: Name of the operation that gives the logits.
    """

    def __init__(self, module: fx.GraphModule, image_shape: Sequence[int]):
        super().__init__(module, garbage_collect_values=False)
        self.operations: dict[str, Operation] = {}
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, str] = {}
        self.blocks: dict[str, None] = {}
        self.logits = ""
        self._shape = list(image_shape)
        self._names: dict[fx.Node, str] = {}  # of the operation that gives a node's value
        self.splits: dict[fx.Node, tuple[fx.Node, int]] = {}  # what is split, along a dimension
        self._module_names = {name for name, _ in module.named_modules()}

    def record(self, image: torch.Tensor) -> None:
        """Run all nodes on an image (1, C, H, W); errors of the module's forward pass through."""
        self.args_iter = iter((image,))
        for node in self.graph.nodes:
            self.node = node
            self.value = self.env[node] = self.run_node(node)
            self._note()

    def _note(self) -> None:
        node, value = self.node, self.value
        is_split = isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor)
        if node.op == "placeholder":
            if not self.operations:
                self.add(kinds.INPUT, shape=self._shape)
            elif not node.args:  # else it has a default, and nobody gives it
                raise UserError("the network takes more than one input")
        elif node.op == "output":
            if node.args[0] not in self._names:
                raise UserError("the network gives something else than one tensor of logits")
            if value.ndim != 2:
                raise UserError(f"the network gives {tuple(value.shape)} for an image, not logits")
            self.logits = self._names[node.args[0]]
        elif node.op == "call_module":
            self._note_module(node.target, self.fetch_attr(node.target))
        elif node.op != "get_attr" and (is_split or isinstance(value, torch.Tensor)):
            self._note_call()

    def _note_call(self) -> None:
        """Note a function or method, whose arguments are nodes where they are images."""
        node = self.node
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "?")
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: n if n in self._names or n in self.splits else self.env[n],
        )
        try:
            is_known = name in FUNCTIONS and FUNCTIONS[name](self, *args, **kwargs)
        except TypeError:  # arguments that are not among the known ones
            is_known = False
        if not is_known:
            self.refuse(name)

    def _note_module(self, name: str, module: nn.Module) -> None:
        (source,) = self.node.args
        if isinstance(module, _BatchNorm):
            self._note_batch_norm(module, source)
        elif not isinstance(module, nn.Conv2d | nn.Linear):
            self.refuse(type(module).__name__)
        elif name in self.operations:
            raise UserError(f"the layer {name} is used twice, which is not supported")
        elif isinstance(module, nn.Linear) and self.value.ndim != 2:
            raise UserError(f"the linear layer {name} reads no vector an image")
        else:
            is_linear = isinstance(module, nn.Linear)
            settings = {} if is_linear else _convolution_attributes(name, module)
            self.add(kinds.LINEAR if is_linear else kinds.CONVOLUTION, source, **settings)
            weight = module.weight.detach()
            bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
            self.layers[name] = _laid_out(weight, bias)

    def _note_batch_norm(self, norm: _BatchNorm, source: fx.Node) -> None:
        if norm.running_mean is None:
            raise UserError(f"the batch norm {self.node.target} has no running statistics")
        name = self._name_of(source, "a batch norm")
        if self.operations[name].is_layer and len(source.users) == 1 and name not in self.norms:
            layer = self.layers[name]
            is_convolution = self.operations[name].kind == kinds.CONVOLUTION
            fuse = fuse_conv_bn_weights if is_convolution else fuse_linear_bn_weights
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse(layer.weight, layer.bias, *statistics)
            self.layers[name] = _laid_out(weight.detach(), bias.detach())
            self.norms[name] = self.node.target
            self.same(source)
            return
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else norm.weight * scale
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        self.add(kinds.AFFINE, source)
        self.layers[self._names[self.node]] = Layer(scale.detach(), shift.detach())

    def add(self, kind: str, *sources: object, **attributes: object) -> bool:
        """Note an operation on the values of nodes, whose value is the current node's."""
        inputs = tuple(self._name_of(source, kind) for source in sources)
        path, owner = [*self.node.meta.get("nn_module_stack", {"": ("", None)}).values()][-1]
        is_named = owner is not None and owner.__module__.startswith("torch.nn")
        name = path if is_named else self.node.name
        taken = {*self.operations, *(() if is_named else self._module_names)}
        if name in taken:  # a module that is used again, or a function named as a module
            name = next(n for i in itertools.count(2) if (n := f"{name}_{i}") not in taken)
        if kind in (kinds.ADD, kinds.CONCATENATE) and path:
            self.blocks[path] = None
        self.operations[name] = Operation(name, kind, inputs, attributes)
        self._names[self.node] = name
        return True

    def same(self, source: object) -> bool:
        """Note that the current node gives the value of another one."""
        self._names[self.node] = self._name_of(source, "an operation")
        return True

    def refuse(self, what: str) -> None:
        """Raise the error that says which operation is not known."""
        raise UserError(
            f"the network's {self.node.name} is {what}, which is not supported; known kinds: "
            f"{', '.join(kinds.KINDS[1:])}"
        )

    def _name_of(self, source: object, reader: str) -> str:
        if not isinstance(source, fx.Node) or source not in self._names:
            self.refuse(f"{reader} of something that is not computed from the image")
        return self._names[source]


def _laid_out(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Layer(weight, bias)


def _convolution_attributes(name: str, module: nn.Conv2d) -> dict[str, object]:
    padding = [0, 0] if module.padding == "valid" else module.padding
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise UserError(f"the convolution {name} pads unequally, which is not supported")
        padding = [r // 2 for r in reach]
    if module.padding_mode != "zeros" and any(padding):
        raise UserError(f"the convolution {name} pads with {module.padding_mode}, not zeros")
    return {
        "stride": list(module.stride),
        "padding": list(padding),
        "dilation": list(module.dilation),
        "groups": module.groups,
    }


# --- functions and methods ------------------------------------------------------------------------
# Each has the parameters of torch's function, notes its operation and returns whether it could.


def _unary(kind: str) -> Callable[..., bool]:
    return lambda r, input, inplace=False: r.add(kind, input)


def _binary(kind: str) -> Callable[..., bool]:
    return lambda r, input, other, alpha=1: alpha == 1 and r.add(kind, input, other)


def _nothing(r: Recorder, input: fx.Node, *args: object, **kwargs: object) -> bool:
    return r.same(input)


def _concatenate(r: Recorder, tensors: Sequence[fx.Node], dim: int = 0) -> bool:
    return dim in (1, 1 - r.value.ndim) and r.add(kinds.CONCATENATE, *tensors)


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def _max_pool(
    r, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False,
) -> bool:  # fmt: skip
    return not return_indices and r.add(
        kinds.MAX_POOL, input, kernel=_pair(kernel_size), stride=_pair(stride or kernel_size),
        padding=_pair(padding), dilation=_pair(dilation), ceil=bool(ceil_mode),
    )  # fmt: skip


def _average_pool(
    r, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
) -> bool:  # fmt: skip
    kernel, padding = _pair(kernel_size), _pair(padding)
    if kernel == list(r.env[input].shape[2:]) and not any(padding):
        return r.add(kinds.GLOBAL_POOL, input, keep=True)
    return divisor_override is None and r.add(
        kinds.AVERAGE_POOL, input, kernel=kernel, stride=_pair(stride or kernel_size),
        padding=padding, ceil=bool(ceil_mode), count_padding=bool(count_include_pad),
    )  # fmt: skip


def _adaptive_pool(r: Recorder, input: fx.Node, output_size: object) -> bool:
    size = list(r.env[input].shape[2:])
    wanted = [old if n is None else n for old, n in zip(size, _pair(output_size), strict=True)]
    if wanted == size:
        return r.same(input)
    if wanted == [1, 1]:
        return r.add(kinds.GLOBAL_POOL, input, keep=True)
    if all(old % new == 0 for old, new in zip(size, wanted, strict=True)):
        kernel = [old // new for old, new in zip(size, wanted, strict=True)]
        return _average_pool(r, input, kernel)
    return r.add(kinds.ADAPTIVE_POOL, input, size=wanted)


def _mean(r: Recorder, input: fx.Node, dim: object = None, keepdim=False, dtype=None) -> bool:
    is_global = (
        r.env[input].ndim == 4
        and isinstance(dim, tuple | list)
        and sorted(d % 4 for d in dim) == [2, 3]
    )
    return is_global and r.add(kinds.GLOBAL_POOL, input, keep=bool(keepdim))


def _reshape(r: Recorder, input: fx.Node, *args: object, **kwargs: object) -> bool:
    """Note whatever keeps an image's numbers in their order: view, flatten, squeeze."""
    old, new = r.env[input].shape, r.value.shape
    if not new or new[0] != old[0]:
        return False
    if new == old:
        return r.same(input)
    if len(new) == 2:
        return r.add(kinds.FLATTEN, input)
    return r.add(kinds.RESHAPE, input, shape=list(new[1:]))


def _permute(r: Recorder, input: fx.Node, *args: object, dims: object = None) -> bool:
    dims = dims or (args[0] if len(args) == 1 else args)
    order = [d % r.value.ndim for d in dims]
    return order[0] == 0 and r.add(kinds.PERMUTE, input, order=order)


def _transpose(r: Recorder, input: fx.Node, dim0: int, dim1: int) -> bool:
    order = list(range(r.value.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(r, input, order)


def _pad(r, input, pad, mode="constant", value=None) -> bool:
    is_zeros = mode == "constant" and not value and min(pad) >= 0 and len(pad) <= 6
    return is_zeros and r.add(kinds.PAD, input, padding=list(pad))


def _split(r: Recorder, input: fx.Node, *args: object, **kwargs: object) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % r.env[input].ndim
    r.splits[r.node] = input, dim
    return dim != 0


def _item(r: Recorder, source: fx.Node, index: object) -> bool:
    if source in r.splits:
        whole, dim = r.splits[source]
        sizes = [part.shape[dim] for part in r.env[source]]
        index %= len(sizes)
        start = sum(sizes[:index])
        return r.add(kinds.SLICE, whole, parts=[[dim, start, start + sizes[index], 1]])
    shape, index = r.env[source].shape, index if isinstance(index, tuple) else (index,)
    if len(index) > len(shape) or not all(isinstance(i, slice) for i in index):
        return False
    parts = [[d, *i.indices(shape[d])] for d, i in enumerate(index) if i != slice(None)]
    if not parts:
        return r.same(source)
    return parts[0][0] != 0 and r.add(kinds.SLICE, source, parts=parts)


def _clamp(r: Recorder, input: fx.Node, min: float | None = None, max: float | None = None) -> bool:
    return min == 0 and max in (None, 6) and r.add("relu" if max is None else "relu6", input)


def _hardtanh(r, input, min_val=-1.0, max_val=1.0, inplace=False) -> bool:
    return _clamp(r, input, min_val, max_val)


FUNCTIONS: dict[str, Callable[..., bool]] = {
    **{kind: _unary(kind) for kind in kinds.ACTIVATIONS},
    **{f"{kind}_": _unary(kind) for kind in ("relu", "sigmoid")},
    **dict.fromkeys(("add", "add_", "iadd"), _binary(kinds.ADD)),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), _binary(kinds.MULTIPLY)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    **dict.fromkeys(("max_pool2d", "boolean_dispatch"), _max_pool),
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _reshape),
    "permute": _permute,
    "transpose": _transpose,
    "pad": _pad,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _split),
    "getitem": _item,
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _hardtanh),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "dropout", "dropout2d", "stochastic_depth", "drop_path"),
        _nothing,
    ),
}
