"""Batch-norm statistics that fit a pruned network.

Pruning shrinks the activations and shifts their means, while the batch norms go on expecting those
of the dense network. Measuring mean and variance anew on training images undoes much of the harm
(Hubara et al., 2021, https://arxiv.org/abs/2006.10518; Izmailov et al., 2018).
"""

from __future__ import annotations

import torch
from torch import nn

from common.images.data import normalize
from common.network.resnet import ResNet18, hooked

# Of a network pruned by 85 and by 90 %, 1,536 images made no better one than 256.
RECALIBRATION_IMAGES = 256
BATCH_SIZE = 128


@torch.no_grad()
def recalibrate_batch_norm(model: ResNet18, images: torch.Tensor) -> None:
    """Measure the running means and variances of ``model`` anew.

    Each layer is measured with the layers before it normalised by their batch's own statistics.
    Unlike ``torch.optim.swa_utils.update_bn``, in which batches count equally however many images
    they have, every image does.

    Args:
        model: Changed in place, left in eval mode.
        images: uint8 training images (N, 3, 32, 32), on the model's device.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    seen = 0
    for batch in images.split(BATCH_SIZE):
        seen += len(batch)
        for norm in norms:
            norm.momentum = len(batch) / seen
        model(normalize(batch))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def adopt_statistics(model: ResNet18, images: torch.Tensor) -> None:
    """Give batch norms that were folded the statistics of images; nothing else changes by it.

    A coded file holds none: its batch norms only add. Measured anew after pruning, they would
    compute something else, but for this.

    Args:
        model: In eval mode; changed in place where all its means are zero.
        images: uint8 training images (N, 3, 32, 32), on the model's device.
    """
    norms = {n: module for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if any(norm.running_mean.any() for norm in norms.values()):
        return

    def adopt(name: str, norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor], _: object) -> None:
        variance, mean = torch.var_mean(*inputs, (0, 2, 3), correction=0)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.add_(scale * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    with hooked(norms, adopt):
        model(normalize(images[:RECALIBRATION_IMAGES]))
