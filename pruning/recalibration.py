"""Batch-norm statistics that fit a pruned network: no labels, no training.

Pruning shrinks the activations and shifts their means, while the batch norms go on expecting those
of the dense network. Measuring mean and variance anew on training images undoes much of the harm
(Hubara et al., 2021, https://arxiv.org/abs/2006.10518; Izmailov et al., 2018).
"""

from __future__ import annotations

import torch
from torch.optim.swa_utils import update_bn

from common.data import normalize
from common.model import ResNet18

# Of a network pruned by 85 and by 90 %, 1,536 images made no better one than 256.
RECALIBRATION_IMAGES = 256
BATCH_SIZE = 128


def recalibrate_batch_norm(model: ResNet18, images: torch.Tensor) -> None:
    """Replace the running means and variances of ``model`` (changed in place, left in eval mode).

    Each layer is measured with the layers before it normalised by their batch's own statistics;
    batches count equally.

    Args:
        model: On the device of ``images``.
        images: uint8 training images, shape (N, 3, 32, 32).
    """
    update_bn((normalize(batch) for batch in images.split(BATCH_SIZE)), model)
    model.eval()
