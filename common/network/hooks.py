"""Watching modules run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import nn


@contextlib.contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Have ``hook`` called with name, layer, inputs and output whenever a layer has run."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
