"""Checks that the tensors of a checkpoint are those of the network that they are loaded into."""

from pathlib import Path

import torch

from common.command.cli import UserError
from common.network.entries import StateDict, shorten

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fit_tensors(path: Path, tensors: StateDict, expected: StateDict, family: str) -> StateDict:
    """Return the tensors as the expected state dict has them: in its order and its types.

    Raises:
        UserError: A tensor is missing, unexpected, of another shape, or has impossible values.
    """
    tensors = dict(tensors)
    for name, value in expected.items():  # old checkpoints lack this counter, which eval ignores
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
    _check_names_and_shapes(path, tensors, expected, family)
    _check_values(path, tensors, expected)
    return {name: tensors[name].to(value.dtype).contiguous() for name, value in expected.items()}


def _check_names_and_shapes(
    path: Path, tensors: StateDict, expected: StateDict, family: str
) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {shorten(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {shorten(unexpected)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ][:1]
    if problems:
        raise UserError(f"{path}: not a {family}: {'; '.join(problems)}")


def _check_values(path: Path, tensors: StateDict, expected: StateDict) -> None:
    for name, value in tensors.items():
        if not expected[name].is_floating_point():
            continue
        if value.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{path}: {name} is {value.dtype}; 16-, 32- or 64-bit floating point is needed"
            )
        # In FP32, what will be computed with: an FP64 value may be finite there only.
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {name} holds negative variances")
