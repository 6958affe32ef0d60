"""Batch-norm statistics that fit a pruned network.

Pruning shrinks the activations and shifts their means, while the batch norms go on expecting those
of the dense network. Measuring mean and variance anew on training images undoes much of the harm
(Hubara et al., 2021, https://arxiv.org/abs/2006.10518; Izmailov et al., 2018).
"""

from __future__ import annotations

import torch

from common.images.data import normalize
from common.network.batch_norm import reestimate_batch_norm
from common.network.resnet import ResNet18

# Of a network pruned by 85 and by 90 %, 1,536 images made no better one than 256.
RECALIBRATION_IMAGES = 256
BATCH_SIZE = 128


def recalibrate_batch_norm(model: ResNet18, images: torch.Tensor) -> None:
    """Re-estimate statistics of ``model`` (in place) on uint8 training images (N, 3, 32, 32)."""
    reestimate_batch_norm(model, (normalize(batch) for batch in images.split(BATCH_SIZE)))
