"""Names of a ResNet's tensors: canonical ones for any others, by the order of the tensors."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from common.checkpoints.resnet import shape_of

BATCH_COUNTER = "num_batches_tracked"  # a batch norm's, which nothing here needs
Pair = tuple[str, str]  # the names of a convolution and of its batch norm


def shared_prefix(names: Iterable[str]) -> str:
    """Return the parts that all names begin with, such as ``module.``; the last is never one."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)
    return "".join(f"{parts[0]}." for parts in shared)


def canonical_names(state: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """Return the canonical name of each tensor, found by their order and shapes alone.

    The tensors are expected in the order of definition: stem, blocks, linear layer; in a block its
    convolutions, each followed by its batch norm, then the shortcut. The names of a block must
    begin alike: those of a pre-activation network, whose shapes are the same, do not. For other
    tensors the result is None.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in _in_order(state)))
    pairs = list(zip(modules[:-1:2], modules[1::2], strict=False))
    if len(modules) % 2 == 0 or len(pairs) < 3 or len(shape_of(state, modules[-1])) != 2:
        return None
    shapes = [(shape_of(state, conv), shape_of(state, norm)) for conv, norm in pairs]
    if any(len(conv) != 4 or norm != conv[:1] for conv, norm in shapes):
        return None
    blocks = _rename_blocks(pairs[1:], state, shapes[0][0][0])
    if blocks is None:
        return None
    renamed = {pairs[0][0]: "conv1", pairs[0][1]: "bn1", **blocks, modules[-1]: "linear"}
    parts = {name: name.rpartition(".") for name in state}
    return {name: f"{renamed[module]}.{entry}" for name, (module, _, entry) in parts.items()}


def _in_order(names: Iterable[str]) -> list[str]:
    """Return the names in their order, or by number if it is alphabetical, as in safetensors."""
    names = [name for name in names if not name.endswith(BATCH_COUNTER)]
    if names != sorted(names):
        return names
    return sorted(
        names, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
    )


def _rename_blocks(
    pairs: Sequence[Pair], state: Mapping[str, torch.Tensor], channels: int
) -> dict[str, str] | None:
    """Return the canonical names of the blocks' modules; ``channels`` is the stem's width."""
    depth = 3 if shape_of(state, pairs[0][0])[2:] == (1, 1) else 2
    own = [f"{kind}{i + 1}" for i in range(depth) for kind in ("conv", "bn")]
    renamed: dict[str, str] = {}
    stage, index = 1, 0
    while pairs:
        names, pairs = [name for pair in pairs[:depth] for name in pair], pairs[depth:]
        if len(names) < len(own):
            return None
        out_channels, roles = shape_of(state, names[-2])[0], own
        fits = bool(pairs) and shape_of(state, pairs[0][0]) == (out_channels, channels, 1, 1)
        projects = fits and _belong_together([*names, *pairs[0]], pairs[1:])
        if projects:
            names, pairs, roles = [*names, *pairs[0]], pairs[1:], [*own, "shortcut.0", "shortcut.1"]
        elif not _belong_together(names, pairs):
            return None
        if renamed and (projects or out_channels != channels):
            stage, index = stage + 1, 0
        renamed |= {n: f"layer{stage}.{index}.{r}" for n, r in zip(names, roles, strict=True)}
        channels, index = out_channels, index + 1
    return renamed


def _belong_together(names: Sequence[str], others: Sequence[Pair]) -> bool:
    """Return whether modules' names begin alike, and other names otherwise."""
    prefix = shared_prefix(f"{name}." for name in names)
    return bool(prefix) and not any(n.startswith(prefix) for pair in others for n in pair)
