"""The operations of a traced module, noted while it runs once on a blank image."""

import itertools
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from common.command.cli import UserError
from common.network import graph as kinds
from common.network.execution import Layer
from common.network.functions import FUNCTIONS
from common.network.graph import Operation


class Recorder(fx.Interpreter):
    """Runs a traced module and notes the operation of each node."""

    def __init__(self, module: fx.GraphModule, image_shape: Sequence[int]):
        super().__init__(module, garbage_collect_values=False)
        self.operations: dict[str, Operation] = {}  # in the order of the module's forward
        self.layers: dict[str, Layer] = {}  # weights of the operations that have any
        self.norms: dict[str, str] = {}  # names of the batch norms that were folded, by layer
        self.blocks: dict[str, None] = {}  # modules in whose forward values are added or joined
        self.logits = ""  # name of the operation that gives the logits
        self._shape = list(image_shape)
        self._names: dict[fx.Node, str] = {}  # name of the operation that gives a node's value
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
            if not isinstance(node.args[0], fx.Node) or node.args[0] not in self._names:
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
            if isinstance(module, nn.Linear):
                self.add(kinds.LINEAR, source)
            else:
                self.add(kinds.CONVOLUTION, source, **_convolution_attributes(name, module))
            weight, bias = module.weight, module.bias
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            self.layers[name] = Layer(weight.detach(), bias.detach()).laid_out()

    def _note_batch_norm(self, norm: _BatchNorm, source: fx.Node) -> None:
        if norm.running_mean is None:
            raise UserError(f"the batch norm {self.node.target} has no running statistics")
        name = self._name_of(source, "a batch norm")
        if self.operations[name].is_layer and len(source.users) == 1 and name not in self.norms:
            layer = self.layers[name]
            is_linear = self.operations[name].kind == kinds.LINEAR
            fuse = fuse_linear_bn_weights if is_linear else fuse_conv_bn_weights
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse(layer.weight, layer.bias, *statistics)
            self.layers[name] = Layer(weight.detach(), bias.detach()).laid_out()
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


def _convolution_attributes(name: str, module: nn.Conv2d) -> dict[str, object]:
    padding = [0, 0] if module.padding == "valid" else module.padding
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise UserError(f"the convolution {name} pads unequally, which is not supported")
        padding = [r // 2 for r in reach]
    if module.padding_mode != "zeros" and any(padding):
        raise UserError(f"the convolution {name} pads with {module.padding_mode}, not zeros")
    numbers = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    return {name: list(values) for name, values in numbers.items()} | {"groups": module.groups}
