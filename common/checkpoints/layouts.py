"""Layouts of checkpoints: the state dict in a training checkpoint, without what wrappers add."""

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from common.checkpoints import entries
from common.checkpoints.entries import StateDict
from common.checkpoints.renaming import BATCH_COUNTER, shared_prefix
from common.command.cli import UserError, log
from common.files.inert import Inert, object_refused
from common.images.normalisation import Statistics

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net")
AVERAGED = re.compile(r"ema|swa|averag|shadow", re.IGNORECASE)
NAMED = "save the network's state_dict(), inside average_parameters() with torch-ema"
SMALLEST_NETWORK = 4  # tensors; fewer that are alike may be layers of one network


def read_layout(
    path: Path, content: object, key: str | None = None, expected: Collection[str] = ()
) -> tuple[StateDict, Statistics | None, str]:
    """Find the state dict in a file's content, and take off what wrappers added.

    ``key`` is that of the state dict to take, such as ``model.ema``; ``expected`` are the names of
    the network's own tensors, if they are known. Return the tensors under the names of the
    network's class, mean and std if the checkpoint holds them, and the prefix that was taken off
    all names.

    Raises:
        UserError: There is no state dict, or several and no choice among them.
    """
    chosen = entries.check_entries(path, _choose_entry(path, content, key))
    whole = entries.apply_masks(path, entries.drop_counters(path, chosen))
    tensors, statistics = entries.take_statistics(whole)
    for some, found in ((whole, None), (tensors, statistics)):
        if (prefix := _prefix_before(some, expected)) is not None:
            return _strip(path, some, prefix), found, prefix
    tensors = _leave_out_others(path, tensors)
    if (prefix := _prefix_before(tensors, expected)) is not None:
        return _strip(path, tensors, prefix), statistics, prefix
    prefix = shared_prefix(tensors)
    return _choose_network(path, _strip(path, tensors, prefix), key), statistics, prefix


def _choose_entry(path: Path, content: object, key: str | None) -> Mapping:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a state dict but a {type(content).__name__}")
    if not content:
        raise UserError(f"{path}: an empty state dict")
    found = _find_states(content)
    if isinstance(content, Inert) and not found and not _is_state(content):
        raise object_refused(path, content.name)
    if key in found:
        return found[key]
    unnamed = _find_unnamed(content)
    if unnamed and not found:
        raise UserError(f"{path}: {unnamed[0]} holds weights without names; {NAMED}")
    if unnamed:
        log.warning(
            "%s: %s holds weights without names and is passed over; if you want those, %s",
            path, unnamed[0], NAMED,
        )  # fmt: skip
    if key is not None:
        for state in found.values() if found else [content]:
            if any(f".{key}." in f".{name}" for name in state):
                return state  # the key is part of the names: see _choose_network
        has = f"has {', '.join(found)}" if found else "has none"
        raise UserError(f"{path}: no state dict under the key {key}; it {has}")
    if len(found) == 1:
        ((name, state),) = found.items()
        log.info("%s: its entry %s is taken", path, name)
        return state
    return found[_prefer(path, found)] if found else content


def _find_states(content: Mapping) -> dict[str, Mapping]:
    """Return the dictionaries of tensors in a checkpoint, at most two deep, by dotted keys."""
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        return {}
    found = {}
    for key, value in _named_mappings(content).items():
        if _is_state(value):
            found[key] = value
        else:
            inner = _named_mappings(value).items()
            found |= {f"{key}.{name}": state for name, state in inner if _is_state(state)}
    return found


def _named_mappings(content: Mapping) -> dict[str, Mapping]:
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}


def _find_unnamed(content: Mapping) -> list[str]:
    """Return the dotted keys of lists of weights, at most two deep, as torch-ema saves them."""
    nested = {"": content} | {f"{k}.": v for k, v in _named_mappings(content).items()}
    return [
        f"{prefix}{key}"
        for prefix, mapping in nested.items()
        for key, value in mapping.items()
        if isinstance(value, list) and _is_weights(value)
    ]


def _is_weights(values: list) -> bool:
    """Return whether a list holds weights, and not one statistic of many epochs."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim >= 2]
    return len({tensor.shape for tensor in tensors}) > 1


def _is_state(content: Mapping) -> bool:
    """Return whether a dictionary holds a network's tensors; it may hold a few other things."""
    tensors = [value for value in content.values() if isinstance(value, torch.Tensor)]
    return 2 * len(tensors) >= len(content) and any(t.ndim >= 2 for t in tensors)


def _prefer(path: Path, found: Mapping[str, Mapping]) -> str:
    """Choose among several state dicts: averaged weights, else the usual key; tell the user."""
    averaged = [key for key in found if AVERAGED.search(key)]
    usual = [key for key in NESTING_KEYS if key in found]
    choice = (averaged or usual or [""])[0]
    others = [key for key in found if key != choice]
    if not choice:
        raise UserError(
            f"{path}: holds {len(found)} state dicts ({', '.join(found)}); choose one with "
            f"--weights {path}:{others[0]}"
        )
    what = "averaged weights" if averaged else "several state dicts"
    log.warning(
        "%s: holds %s beside others: %s is taken; --weights %s:%s takes the other",
        path, what, choice, path, others[0],
    )  # fmt: skip
    return choice


def _strip(path: Path, tensors: StateDict, prefix: str) -> StateDict:
    if prefix:
        log.info("%s: the prefix %s of all names is taken off", path, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _leave_out_others(path: Path, tensors: StateDict) -> StateDict:
    """Leave out what lies beside the prefix of all layers, such as the class weights of a loss."""
    prefix = shared_prefix(name for name, tensor in tensors.items() if tensor.ndim >= 2)
    if others := [name for name in tensors if not name.startswith(prefix)]:
        log.info(
            "%s: %s passed over: all layers' names begin with %s",
            path, entries.shorten(others), prefix,
        )  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefix_before(names: Collection[str], expected: Collection[str]) -> str | None:
    """Return the prefix without which names are the expected ones; None if there is none."""
    own, wanted = (
        {name for name in some if not name.endswith(BATCH_COUNTER)} for some in (names, expected)
    )
    parts = itertools.accumulate(re.findall(r"[^.]*\.", shared_prefix(own)), initial="")
    return next((p for p in parts if {name.removeprefix(p) for name in own} == wanted), None)


def _choose_network(path: Path, tensors: StateDict, key: str | None) -> StateDict:
    """Take one of several networks of the same names and shapes that one state dict holds."""
    groups: dict[str, StateDict] = {}
    for name, tensor in tensors.items():
        groups.setdefault(name.partition(".")[0], {})[name] = tensor
    networks: dict[str, StateDict] = {}
    for group in groups.values():
        if any(tensor.ndim >= 2 for tensor in group.values()):
            prefix = shared_prefix(group)
            networks[prefix] = {name.removeprefix(prefix): t for name, t in group.items()}
    shapes = [{name: t.shape for name, t in network.items()} for network in networks.values()]
    is_several = len(networks) > 1 and all(networks) and len(shapes[0]) > SMALLEST_NETWORK
    if not is_several or any(own != shapes[0] for own in shapes):
        return tensors
    first = next(iter(networks.values()))
    if all(torch.equal(n[name], first[name]) for n in networks.values() for name in first):
        names = ", ".join(networks)
        log.info("%s: the same network is there %d times: %s", path, len(networks), names)
        return first
    by_key = {prefix.removesuffix("."): network for prefix, network in networks.items()}
    return by_key[key if key in by_key else _prefer(path, by_key)]
