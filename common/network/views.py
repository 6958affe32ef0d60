"""Networks that use ``view``, as many do: it refuses values that lie otherwise in memory.

Convolutions keep their input's layout, or take that of their weight, and channels_last is faster.
"""

import functools

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode


class ViewsAsReshapes(TorchFunctionMode):
    """``view`` copies where the layout in memory asks for it."""

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
