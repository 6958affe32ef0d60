"""Watching modules run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import nn


@contextlib.contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Have ``hook`` called with name, layer, inputs and output whenever a layer has run."""
    with contextlib.ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_hook(partial(hook, name)))
        yield
