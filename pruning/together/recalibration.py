"""Batch-norm statistics of a pruned network.

Pruning shrinks the activations and shifts their means, but the batch norms still expect those of
the dense network. Measuring mean and variance again on training images undoes much of the harm
(Hubara et al., 2021, https://arxiv.org/abs/2006.10518; Izmailov et al., 2018).
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.images.data import ImageSet
from common.network.hooks import hooked

# For a network pruned by 85 and by 90 %, 1,536 images were no better than 256.
RECALIBRATION_IMAGES = 256
BATCH_SIZE = 128


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms of a network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, images: ImageSet) -> None:
    """Measure the running means and variances of ``model`` again; it is left in eval mode.

    Each layer is measured with the layers before it normalised by their batch's own statistics.
    Every image has the same weight; in ``torch.optim.swa_utils.update_bn`` every batch has.
    """
    model.eval()  # dropout and the like stay in eval mode
    norms = batch_norms(model).values()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    for batch, _ in images.batches(BATCH_SIZE):
        seen += len(batch)
        for norm in norms:
            norm.momentum = len(batch) / seen
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def adopt_statistics(model: nn.Module, images: ImageSet) -> None:
    """Give batch norms without statistics those of images; what they compute stays the same.

    In a network read from a coded file, batch norms only add a bias, and all running means are
    zero. Without this, measuring their statistics after pruning would change what they compute.
    """
    norms = batch_norms(model)
    if any(norm.running_mean.any() or not norm.affine for norm in norms.values()):
        return

    def adopt(name: str, norm: nn.Module, inputs: tuple[torch.Tensor], _: object) -> None:
        (values,) = inputs
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values, dims, correction=0)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.add_(scale * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    with hooked(norms, adopt):
        model(images.normalize(images.images[:RECALIBRATION_IMAGES]))
