"""Batch-norm statistics measured anew, for weights that have changed: no labels, no training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the running means and variances of ``model`` (changed in place, left in eval mode).

    Each layer is measured with the layers before it normalised by their batch's own statistics.
    Unlike ``torch.optim.swa_utils.update_bn``, in which batches count equally however many images
    they have, every image does.

    Args:
        model: On the device of the batches.
        batches: Normalised images (n, 3, H, W).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    images = 0
    for batch in batches:
        images += len(batch)
        for norm in norms:
            norm.momentum = len(batch) / images
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
