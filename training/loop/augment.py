"""Augmentation of whole batches: crops, flips, CutMix, affine and colour jitter.

All random choices of an epoch are drawn at once, from the seed and the epoch's number alone. So a
resumed run draws the same as one without a break, and processes agree without communication.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common.images.data import ImageSet
from training.recipe import Recipe

# Jitter draws each of these from -maximum to +maximum: angle (radians), log zoom, two shears;
# saturation, log contrast, brightness (in standard deviations).
MAX_AFFINE = np.array([[0.26], [0.2], [0.2], [0.2]])
MAX_COLOUR = np.array([[0.5], [0.4], [0.4]])


@dataclass(frozen=True)
class EpochPlan:
    """Random choices of an epoch, one row for each of N images in the order of their use."""

    order: torch.Tensor  # indices of the images, int64, (N,)
    shift: torch.Tensor  # rows and columns by which each image moves, int64, (N, 2)
    flip: torch.Tensor  # whether each image is mirrored, bool, (N,)
    patch: torch.Tensor  # first row and column of the square that another image covers, (N, 2)
    patch_size: torch.Tensor  # side of that square in pixels, int64, (N,); 0 for none
    # Where each position is taken from, float32, (N, 2, 3); None without jitter, like ``colour``.
    affine: torch.Tensor | None
    colour: torch.Tensor | None  # saturation, contrast, added brightness, float32, (N, 3)


def plan_epoch(
    count: int, size: int, recipe: Recipe, seed: int, epoch: int, device: torch.device
) -> EpochPlan:
    """Draw an epoch's random choices for ``count`` images of ``size`` pixels a side."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(count)
    shift = rng.integers(-recipe.crop_padding, recipe.crop_padding, (count, 2), endpoint=True)
    flip = rng.random(count) < (0.5 if recipe.flip else 0.0)
    # CutMix draws the covered area uniformly, so its side is the root of a uniform number.
    patch_size = np.rint(size * np.sqrt(rng.random(count))).astype(np.int64)
    patch_size *= rng.random(count) < recipe.cutmix
    # Centred anywhere, so that part of the square may lie outside, as published.
    patch = rng.integers(0, size, (count, 2)) - patch_size[:, None] // 2
    jitter = _draw_jitter(rng, count, recipe.jitter) if recipe.jitter else (None, None)
    drawn = (order, shift, flip, patch, patch_size, *jitter)
    return EpochPlan(*(x if x is None else torch.from_numpy(x).to(device) for x in drawn))


def _draw_jitter(
    rng: np.random.Generator, count: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw changes of positions (N, 2, 3) and colours (N, 3), each for ``share`` of the images."""
    moved, coloured = (rng.random((2, count)) < share).astype(np.float32)
    angle, zoom, *shear = rng.uniform(-1, 1, (4, count)) * MAX_AFFINE * moved
    scale, zero = np.exp(zoom), np.zeros(count)
    affine = [
        [scale * np.cos(angle), shear[0] - np.sin(angle), zero],
        [shear[1] + np.sin(angle), scale * np.cos(angle), zero],
    ]
    saturation, contrast, brightness = rng.uniform(-1, 1, (3, count)) * MAX_COLOUR * coloured
    colour = [1 + saturation, np.exp(contrast), brightness]
    by_image = (np.moveaxis(np.array(values, np.float32), -1, 0) for values in (affine, colour))
    return tuple(np.ascontiguousarray(values) for values in by_image)


def make_batch(
    train: ImageSet, pixels: torch.Tensor, plan: EpochPlan, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of augmented, normalised images and their class probabilities.

    Crop, flip and the reflection at the border are one gather. CutMix (Yun et al., 2019,
    https://arxiv.org/abs/1905.04899) shows the next image of the batch, whose class then has that
    part of the probability. ``pixels`` are those of ``train``, uint8, (N, size, size, 3); ``rows``
    of the plan make up the batch. Return float32 (n, 3, size, size), channels_last, and (n,
    classes).
    """
    last = pixels.shape[1] - 1
    line = torch.arange(last + 1, device=pixels.device)
    mirrored = torch.where(plan.flip[rows, None], last - line, line)
    y = _reflect(line + plan.shift[rows, 0, None], last)
    x = _reflect(mirrored + plan.shift[rows, 1, None], last)
    index = plan.order[rows]
    batch = pixels[index[:, None, None], y[:, :, None], x[:, None, :]]
    batch = train.normalize(batch.permute(0, 3, 1, 2))
    targets = F.one_hot(train.labels[index], len(train.classes)).float()
    if plan.affine is not None:
        batch = _change_positions(batch, plan.affine[rows])
        batch = _change_colours(batch, plan.colour[rows])
    # The pixels of the square that another image covers, bool, (n, 1, size, size).
    offset = line - plan.patch[rows, :, None]
    inside = (offset >= 0) & (offset < plan.patch_size[rows, None, None])
    covered = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
    batch = torch.where(covered, batch.roll(1, 0), batch)
    share = covered.float().mean((1, 2, 3))[:, None]
    return batch, targets + share * (targets.roll(1, 0) - targets)


def _change_positions(batch: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shear normalised images (n, 3, H, W); beyond the border they are mirrored."""
    grid = F.affine_grid(affine, batch.shape, align_corners=False)
    moved = F.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def _change_colours(batch: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Change saturation, contrast and brightness of normalised images (n, 3, H, W)."""
    saturation, contrast, brightness = colour.T[..., None, None, None]
    grey = batch.mean(1, keepdim=True)
    batch = torch.lerp(grey, batch, saturation)
    mean = batch.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, batch, contrast) + brightness


def _reflect(position: torch.Tensor, last: int) -> torch.Tensor:
    """Mirror positions outside an image at its border, without repeating the edge."""
    return last - (last - position.abs()).abs()
