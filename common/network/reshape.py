"""A module with the tensors of a checkpoint, whose layers may be narrower than its own."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
