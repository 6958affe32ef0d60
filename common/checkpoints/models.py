"""Networks for the weights of a checkpoint: named by the user, and as wide as the weights.

``--model torchvision:NAME`` or ``FILE.py:FUNCTION`` names one.
"""

import copy
import difflib
import importlib.util
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from common.command.cli import UserError
from common.network.tracing import with_reshapes

TORCHVISION = "torchvision:"


def build_model(model: str, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Build the network that ``--model`` names, with weights of its own choice, in eval mode.

    A user's function is run. torchvision's networks get the number of classes of the checkpoint,
    whose tensors are ``state``, and parameters on the meta device. What cannot be built is a
    UserError.
    """
    if model.startswith(TORCHVISION):
        return _build_torchvision(model.removeprefix(TORCHVISION), state).eval()
    file, _, function = model.rpartition(":")
    if not file.endswith(".py") or not function:
        raise UserError(
            f"--model {model}: neither torchvision:NAME nor a file and its function, such as "
            f"mine.py:build{_suggest(model)}"
        )
    # The user's code may draw random numbers; the run's own stay as they are.
    with torch.random.fork_rng(devices=[]):
        return with_reshapes(_run_function(Path(file), function)).eval().float()


def _classifiers() -> list[str]:
    from torchvision import models

    # torchvision's segmentation and detection networks have other names in the same list.
    return models.list_models(module=models)


def _suggest(name: str) -> str:
    """Return a question that names torchvision's network of a similar name; empty without one."""
    similar = difflib.get_close_matches(name.lower(), _classifiers(), n=1)
    return f"; did you mean {TORCHVISION}{similar[0]}?" if similar else ""


def _build_torchvision(name: str, state: Mapping[str, torch.Tensor]) -> nn.Module:
    from torchvision import models

    if name not in _classifiers():
        raise UserError(
            f"--model {TORCHVISION}{name}: torchvision has no such classifier; "
            f"torchvision.models.list_models() lists them{_suggest(name)}"
        )

    options = {}
    if name in ("googlenet", "inception_v3"):
        has_auxiliary = any(entry.lower().startswith("aux") for entry in state)
        options = {"aux_logits": has_auxiliary, "init_weights": False}

    def build(class_count: int) -> nn.Module:
        with _EmptyOnMeta():
            return models.get_model(name, weights=None, num_classes=class_count, **options)

    default, other = build(1000).state_dict(), build(1001).state_dict()
    heads = [entry for entry in default if default[entry].shape != other[entry].shape]
    counts = [len(state[entry]) for entry in heads if entry in state and state[entry].ndim]
    return build(counts[0] if counts and counts[0] else 1000)


class _EmptyOnMeta(TorchFunctionMode):
    """Gives parameters no memory; what a constructor computes with, as a RegNet's does, is real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **(kwargs or {}) | device)


def _run_function(file: Path, function: str) -> nn.Module:
    file = file.expanduser()
    if not file.is_file():
        raise UserError(f"--model: {file}: no such file")
    path = [str(file.resolve().parent), *sys.path]
    try:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.path, path = path, sys.path  # its own imports lie beside it
        sys.modules[file.stem], earlier = module, sys.modules.get(file.stem)
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path = path
            if earlier is not None:
                sys.modules[file.stem] = earlier
        build: Callable[[], object] | None = getattr(module, function, None)
        network = build() if callable(build) else None
    except Exception as error:  # whatever the user's code raises
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model: {file}: {type(error).__name__}: {reason}") from None
    if build is None:
        raise UserError(f"--model: {file}: has no function {function}")
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(f"--model: {file}: {function}() returns {kind}, not a torch.nn.Module")
    return network


# --- other widths --------------------------------------------------------------------------------


def narrowed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the network as narrow as the tensors, if these are those of its slim form."""
    blank = {}
    for name, wide in model.state_dict().items():
        shape = tensors[name].shape if name in tensors else wide.shape[:0]
        if len(shape) != wide.ndim or any(map(operator.gt, shape, wide.shape)):
            return model
        blank[name] = wide.new_empty(shape, device="meta")
    return with_tensors(model, blank)


def with_tensors(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module, in eval mode, that has other tensors and is as wide as they are.

    Layers without a bias may have gained one. Of the tensors of a module with several names, those
    of the first count. One that is missing, unexpected or of other dimensions is a ValueError.
    """
    shaped = copy.deepcopy(model)
    left, seen = dict(state), set()
    for prefix, module in shaped.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                full = f"{prefix}.{name}" if prefix else name
                new, is_kept = left.pop(full, None), name in module._non_persistent_buffers_set
                if is_kept or module in seen or (new is None and old is None):
                    continue
                if new is None or (old is not None and new.ndim != old.ndim):
                    raise ValueError(f"{full} is missing or has another number of dimensions")
                new = new.clone()
                tensors[name] = nn.Parameter(new) if tensors is module._parameters else new
        seen.add(module)
        _fit_sizes(module)
    if left:
        raise ValueError(f"{min(left)} is unexpected")
    return shaped.eval()


def _fit_sizes(module: nn.Module) -> None:
    """Set a layer's sizes to those of its tensors."""
    if isinstance(module, nn.Conv2d):
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
